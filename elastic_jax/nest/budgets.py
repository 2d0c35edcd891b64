"""Budgets and the grid of choices they are met on.

A budget is a named share of the parent's cost. Choices are the widths that an axis may take; a `Grid` is all of them, and a
submodel on the grid is one choice per row (a row is an axis, or an axis of one block when it is chosen per layer).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic_jax import cost
from elastic_jax.arch import AXES, Arch, unknown_name
from elastic_jax.errors import UserError
from elastic_jax.layout import FLAT, Layout

# The axes of channels, which matmuls see in tiles; heads and experts are whole tiles themselves, or none.
CHANNELS = ('embed', 'mlp', 'expert_width', 'shared_width')
FEW = 4

Metric = Callable[[Arch, Sequence[Any] | None], Any]


@dataclasses.dataclass(frozen=True)
class AxisChoices:
    """The widths that one axis may take, falling, the parent's own first. One `row` per block when chosen per layer."""

    axis: str
    widths: tuple[int, ...]
    blocks: tuple[int, ...] = ()
    per_layer: bool = False

    @property
    def rows(self) -> int:
        return len(self.blocks) if self.per_layer else 1


Grid = tuple[AxisChoices, ...]
Point = dict[str, tuple[int, ...]]  # axis -> index of the choice in each row


def make_grid(
    parent: Arch,
    choices: Mapping[str, Sequence[float | int]],
    per_layer: Sequence[str] = (),
    layout: Layout = FLAT,
    multiple: int = 1,
) -> Grid:
    """The grid of an experiment's choices.

    Args:
      choices: axis -> widths, or shares of the parent's width (floats up to 1.0), rounded to whole multiples.
      per_layer: the axes that every block chooses for itself.
      multiple: rounds shares of channel axes to a multiple of it (times G where the axis is blocked): the tile of the chip.
        Where the parent's own width holds fewer than FEW of them, it does not count: so small a model is not bound by tiles.
    Raises: UserError for an unknown axis, one the parent does not have or blocks cannot choose, or a width that does not nest.
    """
    own = [axis.name for axis in parent.axes()]
    grid = []
    for name in [*choices, *(axis for axis in per_layer if axis not in choices)]:
        if name not in own:
            raise UserError(unknown_name('axis in choices', name, own))
        if name not in choices:
            raise UserError(f'axis {name!r} is to be chosen per layer, but has no choices; add it to them')
        if name in per_layer and AXES[name].kind is None:
            raise UserError(f'axis {name!r} is one for all blocks and cannot be chosen per layer; take it out of per_layer')
    for name, values in choices.items():
        by_block = parent.layer_widths(name)
        full = {'embed': parent.embed, 'layers': parent.layers}.get(name) or max(by_block.values())
        step = axis_step(parent, name, layout, multiple)
        widths = sorted({_width(name, value, full, step) for value in values} | {full}, reverse=True)
        for width in widths:
            layout.check(parent.narrow(fitted(parent, name, width)))
        grid.append(AxisChoices(name, tuple(widths), tuple(by_block), name in per_layer))
    return tuple(grid)


def fitted(parent: Arch, name: str, width: int, blocks: Sequence[int] | None = None) -> dict[str, int]:
    """A choice of an axis as `Arch.narrow` takes it: a heterogeneous parent's narrower blocks keep their own width.

    A width that no block has stays as it is, so that `narrow` refuses it. `blocks`: those that make the choice; None: all.
    """
    own = parent.layer_widths(name)
    if AXES[name].kind is None or width > max(own.values()):
        return {name: width}
    return {f'{name}@{i}': min(width, own[i]) for i in (own if blocks is None else blocks)}


def axis_step(parent: Arch, name: str, layout: Layout, multiple: int) -> int:
    """What the widths of an axis are multiples of: Mamba's groups, the layout's G, times `multiple` for channels."""
    mixers = [parent.mixers[i] for i in parent.layer_widths(name)]
    if name == 'mamba_heads':
        return max(mixer.groups for mixer in mixers)
    blocks = max((layout.blocks(name, mixer) for mixer in mixers), default=1)
    full = parent.embed if name == 'embed' else max(parent.layer_widths(name).values(), default=0)
    return blocks * multiple if name in CHANNELS and full >= FEW * blocks * multiple else blocks


def _width(name: str, value: float | int, full: int, step: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"choice {value!r} of axis {name} is not a width or a share of the parent's width {full}")
    if isinstance(value, int) and value != 1:
        return value
    if value > 1:
        raise UserError(f'choice {value} of axis {name}: a share is at most 1.0; write a whole number for a width')
    return min(full, max(step, round(value * full / step) * step))


def full_point(grid: Grid) -> Point:
    """The parent itself: the first choice in every row."""
    return {choices.axis: (0,) * choices.rows for choices in grid}


def smallest_point(grid: Grid) -> Point:
    return {choices.axis: (len(choices.widths) - 1,) * choices.rows for choices in grid}


def point_arch(parent: Arch, grid: Grid, point: Point) -> Arch:
    """The submodel at a point of the grid."""
    widths: dict[str, int] = {}
    for choices in grid:
        rows = [(block,) for block in choices.blocks] if choices.per_layer else [choices.blocks]
        for blocks, index in zip(rows, point[choices.axis], strict=True):
            widths |= fitted(parent, choices.axis, choices.widths[index], blocks)
    return parent.narrow(widths)


def metric(name: str, context: int = 0, batch: int = 1, bytes_per_param: float = 2.0) -> Metric:
    """The cost that budgets are measured in, as a function of (arch, keep) that is differentiable in the widths.

    `parameters`, `active_parameters`, or `memory`: weights + KV cache + SSM state, in bytes, at a context length.
    """
    known = {
        'parameters': cost.parameters,
        'active_parameters': cost.active_parameters,
        'memory': lambda arch, keep=None: cost.memory_bytes(arch, context, batch, bytes_per_param, keep=keep),
    }
    if name not in known:
        raise UserError(unknown_name('budget metric', name, list(known)))
    return known[name]


def resolve_targets(
    budgets: Mapping[str, float | int], parent: Arch, grid: Grid, measure: Metric, tolerance: float
) -> dict[str, float]:
    """Budget name -> target as a share of the parent's cost, largest first.

    A budget up to 1.0 is a share; a larger number is an absolute cost. Raises UserError when a budget is below what the
    choices reach, or above the parent.
    """
    whole = float(measure(parent, None))
    floor = float(measure(point_arch(parent, grid, smallest_point(grid)), None)) / whole
    targets = {}
    for name, value in budgets.items():
        share = float(value) if value <= 1 else float(value) / whole
        if not 0 < share <= 1:
            raise UserError(f"budget {name}={value} is not between 0 and the parent's own cost of {whole:.4g}")
        if share < floor / (1 + tolerance):
            raise UserError(
                f'budget {name} asks for {share:.1%} of the parent, but the smallest choices reach {floor:.1%}; '
                'add smaller choices, or raise the budget'
            )
        targets[name] = share
    return dict(sorted(targets.items(), key=lambda item: -item[1]))
