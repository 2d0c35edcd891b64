"""Arch: a frozen, hashable description of a model, which fixes the shape of every parameter.

A model is a stack of residual blocks `x + mixer(rmsnorm(x))`, one mixer per block, written as a pattern of letters:
`M` Mamba-2, `*` attention, `-` MLP, `E` mixture of experts. A submodel is an ordinary Arch with smaller widths; a dropped
block is `None` in its place, so block i of a submodel is always cut from block i of its parent.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from elastic_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding. `scaling` holds the Llama-3 rule's (factor, low_freq, high_freq, original_context), or nothing."""

    theta: float = 10000.0
    scaling: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Attention:
    """Causal attention with grouped queries: `query_heads` query heads for each of `kv_heads` KV heads."""

    kv_heads: int
    query_heads: int
    head_dim: int
    rope: Rope | None = None
    qk_norm: bool = False
    bias: bool = False
    output_bias: bool = False


@dataclasses.dataclass(frozen=True)
class Mamba:
    """Mamba-2. `heads` counts all heads; `groups` of them share B and C. `dt_min`, `dt_max` clamp the step size (0: no floor)."""

    heads: int
    head_dim: int
    groups: int
    state: int
    conv: int = 4
    chunk: int = 128
    conv_bias: bool = True
    dt_min: float = 0.0
    dt_max: float = float('inf')

    @property
    def heads_per_group(self) -> int:
        return exact_divide(self.heads, self.groups)


@dataclasses.dataclass(frozen=True)
class MLP:
    """Feed-forward block: `down(relu(up x)²)` for 'relu2', `down(silu(gate x) · up x)` for 'swiglu'."""

    width: int
    activation: str = 'relu2'
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class MoE:
    """Mixture of experts, dropless: `top_k` of `experts`, chosen among the best `top_groups` of `groups` routing groups.

    `scoring` is 'sigmoid' or 'softmax'; with `correction_bias` experts are chosen by score + bias and weighed by the score.
    `shared_width` is the width of an expert that every token uses (0: none).
    """

    experts: int
    expert_width: int
    top_k: int
    shared_width: int = 0
    activation: str = 'relu2'
    scoring: str = 'sigmoid'
    correction_bias: bool = True
    groups: int = 1
    top_groups: int = 1
    normalize: bool = True
    scale: float = 1.0


Mixer = Attention | Mamba | MLP | MoE
# Grown by model/mixers.py, as is AXES. A kind's name in lower case names it in configs: `mamba`, `attention`, `mlp`, `moe`.
LETTERS: dict[str, type] = {'M': Mamba, '*': Attention, '-': MLP, 'E': MoE}


@dataclasses.dataclass(frozen=True)
class Axis:
    """One elastic dimension: `field` of mixers of type `kind` (no kind: of the whole model)."""

    name: str
    kind: type | None
    field: str


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis('embed', None, 'embed'),
        Axis('layers', None, 'layers'),
        Axis('query_heads', Attention, 'query_heads'),
        Axis('kv_heads', Attention, 'kv_heads'),
        Axis('mamba_heads', Mamba, 'heads'),
        Axis('mamba_head_dim', Mamba, 'head_dim'),
        Axis('mlp', MLP, 'width'),
        Axis('experts', MoE, 'experts'),
        Axis('expert_width', MoE, 'expert_width'),
        Axis('shared_width', MoE, 'shared_width'),
    )
}


def layer_axes() -> tuple[Axis, ...]:
    """The axes that belong to a kind of mixer."""
    return tuple(axis for axis in AXES.values() if axis.kind is not None)


def letter_of(kind: type) -> str:
    """The letter of a kind of mixer in patterns."""
    return next(letter for letter, own in LETTERS.items() if own is kind)


Widths = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Arch:
    """A model: its widths and its blocks.

    `ranking` lists the drop units (runs of `unit_blocks` blocks) from most to least important: the `layers` axis keeps its
    first k. It is found by calibration and says nothing about this model's own shape, so it takes no part in equality.
    """

    vocab: int
    embed: int
    mixers: tuple[Mixer | None, ...]
    norm_eps: float = 1e-5
    tied: bool = False
    unit_blocks: int = 1
    ranking: tuple[int, ...] = dataclasses.field(default=(), compare=False)

    @classmethod
    def from_pattern(cls, pattern: str, **kwargs: Any) -> Arch:
        """Builds the Arch whose block i is the mixer that letter i of `pattern` names.

        Args:
          kwargs: the mixers by the names of their kinds in lower case (`mamba`, `attention`, `mlp`, `moe`), and fields of Arch.
        """
        given = {letter: kwargs.pop(kind.__name__.lower(), None) for letter, kind in LETTERS.items()}
        for letter in pattern:
            if given.get(letter) is None:
                raise UserError(
                    f'pattern {pattern!r} has {letter!r}, but no mixer is given for it; letters are {" ".join(LETTERS)}'
                )
        return cls(mixers=tuple(given[letter] for letter in pattern), **kwargs).check()

    @property
    def pattern(self) -> str:
        """One letter per block; a dropped block is '.'."""
        return ''.join('.' if mixer is None else letter_of(type(mixer)) for mixer in self.mixers)

    @property
    def units(self) -> int:
        """The number of drop units, dropped ones included."""
        return len(self.mixers) // self.unit_blocks

    @property
    def layers(self) -> int:
        """The number of drop units that are kept."""
        return len(self.kept_units())

    def kept_units(self) -> list[int]:
        """The drop units that are kept, from most to least important."""
        return [unit for unit in (self.ranking or range(self.units)) if self.mixers[unit * self.unit_blocks] is not None]

    def axes(self) -> tuple[Axis, ...]:
        """The axes along which this model can shrink."""
        kinds = {type(mixer) for mixer in self.mixers}
        return tuple(
            axis
            for axis in AXES.values()
            if (axis.kind is None or axis.kind in kinds)
            and not (axis.name == 'shared_width' and not any(self.layer_widths('shared_width').values()))
        )

    def layer_widths(self, axis_name: str) -> dict[int, int]:
        """Block index -> width, for every kept block that has the axis."""
        axis = AXES[axis_name]
        return {
            i: getattr(mixer, axis.field)
            for i, mixer in enumerate(self.mixers)
            if axis.kind is not None and isinstance(mixer, axis.kind)
        }

    def widths(self) -> dict[str, int]:
        """Width by axis name, with `axis@block` entries for the blocks that differ from the axis's most common width."""
        result = {'embed': self.embed, 'layers': self.layers}
        for axis in self.axes():
            if axis.kind is None:
                continue
            by_block = self.layer_widths(axis.name)
            values = list(by_block.values())
            common = max(set(values), key=lambda value: (values.count(value), value))
            result[axis.name] = common
            result |= {f'{axis.name}@{i}': width for i, width in by_block.items() if width != common}
        return result

    def narrow(self, widths: Widths | None = None, **kwargs: int) -> Arch:
        """The submodel with the given widths; axes that are not named stay as they are.

        `layers` is applied last, so `mlp@3` may name a block which is then dropped. Raises UserError when a name is unknown
        or a width does not nest.
        """
        requested = {**(widths or {}), **kwargs}
        own = {axis.name for axis in self.axes()}
        mixers, embed = list(self.mixers), self.embed
        # Whole-axis widths first: `mlp@3` refines `mlp` whatever order they were given in.
        for name, width in sorted(requested.items(), key=lambda item: '@' in item[0]):
            base, _, block = name.partition('@')
            if base not in own:
                raise UserError(unknown_name('axis', base, sorted(own)))
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise UserError(f'width {name}={width!r} is not a positive whole number')
            axis = AXES[base]
            if base == 'embed' and not block:
                embed = width
            elif axis.kind is None:
                if block:
                    raise UserError(f'axis {base} holds for the whole model; write {base}={width}, without @{block}')
            else:
                for i in _blocks_named(self, axis, block):
                    mixers[i] = dataclasses.replace(mixers[i], **{axis.field: width})
        if 'layers' in requested:
            mixers = self._drop(mixers, requested['layers'])
        child = dataclasses.replace(self, embed=embed, mixers=tuple(mixers)).check()
        problem = child.why_not_nested(self)
        if problem:
            raise UserError(problem)
        return child

    def _drop(self, mixers: list[Mixer | None], keep: int) -> list[Mixer | None]:
        kept = self.kept_units()
        if keep > len(kept):
            raise UserError(f'layers={keep} does not nest: the parent has {len(kept)}')
        alive = set(kept[:keep])
        return [mixer if i // self.unit_blocks in alive else None for i, mixer in enumerate(mixers)]

    def nests_in(self, parent: Arch) -> bool:
        """Whether every axis of this model is a prefix of the parent's, and nothing else differs."""
        return not self.why_not_nested(parent)

    def why_not_nested(self, parent: Arch) -> str:
        """The first reason why this model does not nest in `parent`; empty when it does."""
        for name in ('vocab', 'norm_eps', 'tied', 'unit_blocks'):
            if getattr(self, name) != getattr(parent, name):
                return f'{name}={getattr(self, name)} differs from the parent, which has {getattr(parent, name)}'
        if len(self.mixers) != len(parent.mixers):
            return f'{len(self.mixers)} blocks do not nest in {len(parent.mixers)}: a dropped block must stay as None'
        if self.embed > parent.embed:
            return f'embed={self.embed} does not nest: the parent has {parent.embed}'
        for i, (own, theirs) in enumerate(zip(self.mixers, parent.mixers, strict=True)):
            if own is None:
                continue
            if type(own) is not type(theirs):
                return f'block {i} is {type(own).__name__}, but {type(theirs).__name__} in the parent'
            elastic = {axis.field: axis.name for axis in layer_axes() if axis.kind is type(own)}
            for field in dataclasses.fields(own):
                mine, full = getattr(own, field.name), getattr(theirs, field.name)
                if field.name in elastic and mine > full:
                    return f'{elastic[field.name]}@{i}={mine} does not nest: the parent has {full}'
                if field.name not in elastic and mine != full:
                    return f'block {i} has {field.name}={mine}, but {full} in the parent'
                if field.name == 'shared_width' and (mine == 0) != (full == 0):
                    return f'shared_width@{i}={mine} does not nest: the parent has {full}'
        return ''

    def check(self) -> Arch:
        """Returns self if the widths fit each other, else raises UserError."""
        for name in ('vocab', 'embed'):
            _require(getattr(self, name) >= 1, f'{name}={getattr(self, name)} must be at least 1')
        _require(
            self.unit_blocks >= 1 and len(self.mixers) % self.unit_blocks == 0,
            f'{len(self.mixers)} blocks do not divide into drop units of {self.unit_blocks}',
        )
        for i, mixer in enumerate(self.mixers):
            if mixer is not None:
                _check_mixer(i, mixer)
        return self

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` rebuilds this Arch; equal mixers are written once."""
        kinds = list(dict.fromkeys(mixer for mixer in self.mixers if mixer is not None))
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != 'mixers'}
        described = [{'kind': type(mixer).__name__, **dataclasses.asdict(mixer)} for mixer in kinds]
        for entry in described:
            if entry.get('dt_max') == float('inf'):
                entry['dt_max'] = None  # JSON has no infinity.
        index = [None if mixer is None else kinds.index(mixer) for mixer in self.mixers]
        return {**fields, 'ranking': list(self.ranking), 'mixers': described, 'blocks': index}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Arch:
        """The Arch that `to_json` wrote. Raises UserError when it is damaged."""
        try:
            data = dict(data)
            mixers = [_mixer_from_json(entry) for entry in data.pop('mixers')]
            blocks = tuple(None if index is None else mixers[index] for index in data.pop('blocks'))
            return cls(**{**data, 'ranking': tuple(data['ranking'])}, mixers=blocks).check()
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f'the description of the model is damaged ({error!r}); restore the file it came from') from error


def _mixer_from_json(entry: Mapping[str, Any]) -> Mixer:
    entry = dict(entry)
    kind = {kind.__name__: kind for kind in LETTERS.values()}[entry.pop('kind')]
    if kind is Attention and entry.get('rope') is not None:
        entry['rope'] = Rope(entry['rope']['theta'], tuple(entry['rope']['scaling']))
    if kind is Mamba and entry.get('dt_max') is None:
        entry['dt_max'] = float('inf')
    return kind(**entry)


def _blocks_named(arch: Arch, axis: Axis, block: str) -> list[int]:
    blocks = list(arch.layer_widths(axis.name))
    if not block:
        return blocks
    if not block.isdecimal() or int(block) not in blocks:
        raise UserError(f'{axis.name}@{block}: block {block} has no such axis; blocks that do: {blocks}')
    return [int(block)]


def _check_mixer(i: int, mixer: Mixer) -> None:
    names = {axis.field: axis.name for axis in layer_axes() if axis.kind is type(mixer)}
    for field in dataclasses.fields(mixer):
        if field.type == 'int':
            size, least = getattr(mixer, field.name), 0 if field.name == 'shared_width' else 1
            _require(size >= least, f'{names.get(field.name, field.name)}@{i}={size} must be at least {least}')
    if isinstance(mixer, Mamba):
        _require(mixer.heads % mixer.groups == 0, f'mamba_heads@{i}={mixer.heads} is not a multiple of its {mixer.groups} groups')
    elif isinstance(mixer, MoE):
        _require(mixer.scoring in ('sigmoid', 'softmax'), f'block {i}: scoring {mixer.scoring!r} is not sigmoid or softmax')
        _require(
            mixer.experts % mixer.groups == 0 and mixer.top_groups <= mixer.groups,
            f'experts@{i}={mixer.experts} do not divide into {mixer.groups} routing groups, of which {mixer.top_groups} are used',
        )
        reachable = mixer.experts // mixer.groups * mixer.top_groups
        _require(reachable >= mixer.top_k, f'experts@{i}={mixer.experts} leaves {reachable} to choose top_k={mixer.top_k} from')
        _require(
            mixer.groups == 1 or mixer.experts // mixer.groups >= 2,
            f'experts@{i}={mixer.experts} leaves fewer than two experts in each of {mixer.groups} routing groups',
        )
    elif isinstance(mixer, Attention):
        _require(mixer.rope is None or mixer.head_dim % 2 == 0, f'block {i}: rotary needs an even head_dim')
    if isinstance(mixer, MLP | MoE):
        _require(mixer.activation in ('relu2', 'swiglu'), f'block {i}: activation {mixer.activation!r} is not relu2 or swiglu')


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def exact_divide(a: Any, b: Any) -> Any:
    """a / b, staying an int where both are; traced or float widths (expected widths) divide as they are."""
    return a // b if isinstance(a, int) and isinstance(b, int) else a / b


def unknown_name(what: str, name: str, known: list[str]) -> str:
    """One sentence for a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean {near[0]!r}? ' if near else ''
    return f'unknown {what} {name!r}; {hint}known: {", ".join(known)}'


def parse_widths(text: str) -> dict[str, int]:
    """Reads 'embed=96,mlp=256,mlp@3=128' (the command line's --widths)."""
    widths = {}
    for part in filter(None, (part.strip() for part in text.split(','))):
        name, equals, value = part.partition('=')
        name, value = name.strip(), value.strip()
        if not equals or not value.isdecimal():
            raise UserError(f'cannot read {part!r} in widths {text!r}; write axis=number, such as embed=96,mlp@3=128')
        if name in widths:
            raise UserError(f'widths {text!r} give {name} twice; keep one of them')
        widths[name] = int(value)
    if not widths:
        raise UserError('no widths given; write axis=number, such as embed=96,mlp=256')
    return widths
