"""What a decoding step takes on this device: of a whole size, and of any size from a table of measured layer times.

A table holds, for each kind of block, the time of one block at a few widths of each axis that shrinks, all combined; a time in
between is interpolated linearly along each axis, as the weights and the work of a block grow so. What is measured runs by the
very program that serves: a model of several such blocks, less the same model of none, whose own time (embedding, head and
sampling) is in the table too. Measured times are kept in a file by device, and looked up there before anything is measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.interpolate import RegularGridInterpolator

from elastic_jax.arch import AXES, Arch, Mixer
from elastic_jax.errors import UserError, WorkError
from elastic_jax.infer.decoding import PIECE, advance, empty_state, requests_of
from elastic_jax.infer.resident import Weights, weights_of
from elastic_jax.infer.sampling import Sampling
from elastic_jax.layout import Layout
from elastic_jax.model.params import layer_name
from elastic_jax.nest.masks import axis_sizes
from elastic_jax.nest.slice import slice_params

FORMAT = 1
FEWEST, MOST = 2, 8  # blocks in a row that are timed
ROUNDS, SECONDS = 5, 0.3  # pieces that are timed at least, and for how long
KNOTS = 9  # more combined widths than this of one kind of block: two widths of each axis instead of three
Say = Callable[[str], None]


def decode_seconds(weights: Weights, rows: int = 1, context: int = 4096) -> float:
    """Seconds of one decoding step of `rows` sequences with caches for `context` tokens.

    The least of several pieces of 16 steps: other work on the machine only ever adds.
    """
    slots = max(context, PIECE)
    state = empty_state(weights, requests_of([Sampling()] * rows, [0] * rows), slots, [PIECE] * rows)
    seconds: list[float] = []
    while len(seconds) <= ROUNDS or sum(seconds[1:]) < SECONDS:
        # Every piece is the last that the caches have room for.
        cache = state.cache._replace(length_B=jnp.full(rows, slots - PIECE, jnp.int32))
        state = state._replace(cache=cache, left_B=jnp.full(rows, PIECE, jnp.int32))
        jax.block_until_ready(state)
        begun = time.perf_counter()
        state, tokens_BxN, _ = advance(weights, state, np.int32(PIECE))
        jax.block_until_ready(tokens_BxN)
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:]) / PIECE  # the first one compiles


def device_key() -> str:
    """The device that times are of."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() == 'cpu':
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        kind = f'{kind} {_processor()}, cores: {cores}'
    return f'{kind}, jax {jax.__version__}'


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.machine())


def default_table() -> Path:
    """Where layer times are kept for all checkpoints: `layer_times.json` in the user's cache folder."""
    root = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(root) / 'elastic_jax' / 'layer_times.json'


class Times:
    """The file of measured times: device -> what was measured -> seconds."""

    def __init__(self, path: Path):
        self.path, self.measured = path, 0
        self._used: set[str] = set()
        self.device = device_key()
        self._all = self._read()
        self.own: dict[str, float] = self._all.setdefault(self.device, {})

    def _read(self) -> dict[str, dict[str, float]]:
        if not self.path.exists():
            return {}
        try:
            stored = json.loads(self.path.read_text())
            if stored['format'] != FORMAT:
                raise ValueError(f'format {stored["format"]}, this program reads {FORMAT}')
            return {device: {key: float(value) for key, value in own.items()} for device, own in stored['devices'].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{self.path} is no table of layer times ({error!r}); delete it, or name another file') from error

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """The seconds kept for `key`, else measured now and kept."""
        self._used.add(key)
        if key not in self.own:
            self.own[key] = measure()
            self.measured += 1
            self._write()
        return self.own[key]

    @property
    def reused(self) -> int:
        """How many of the times asked for were in the file before."""
        return len(self._used) - self.measured

    def _write(self) -> None:
        # Another program may have kept times meanwhile.
        self._all = self._read()
        self.own = self._all[self.device] = self._all.get(self.device, {}) | self.own
        temporary = self.path.with_suffix(f'.{os.getpid()}.tmp')
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({'format': FORMAT, 'devices': self._all}, indent=1, sort_keys=True))
            temporary.replace(self.path)
        except OSError as error:
            raise WorkError(f'layer times cannot be kept in {self.path} ({error.strerror}); name another file') from error


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The times of one kind of block, or of the model without blocks: over the widths of some axes."""

    axes: tuple[str, ...]
    seconds: Callable[[Sequence[float]], float]

    def __call__(self, arch: Arch, block: int = -1) -> float:
        width = lambda axis: arch.embed if axis == 'embed' else arch.layer_widths(axis)[block]
        return max(0.0, float(self.seconds([width(axis) for axis in self.axes])))


class LatencyTable:
    """Predicts the seconds of a decoding step of every size between some widths."""

    def __init__(
        self,
        params: Any,
        parent: Arch,
        widths: Mapping[str, Collection[int]],
        layout: Layout,
        times: Times,
        *,
        rows: int = 1,
        context: int = 4096,
        dtype: Any = jnp.float32,
        say: Say = lambda line: None,
    ):
        """Measures what the file lacks.

        Args:
          params: the parent's, in the dtype to serve in; what is timed is cut from them.
          widths: of every axis, those to predict for; an axis that is not named stays whole.
          rows, context: sequences served together, and tokens that their caches have room for.
        """
        self.parent, self.layout, self.params, self.times = parent, layout, params, times
        self.rows, self.context, self.dtype, self.say = rows, context, jnp.dtype(dtype), say
        self._widths = widths
        self._blocks: dict[Mixer, list[int]] = {}
        for i, mixer in enumerate(parent.mixers):
            if mixer is not None:
                self._blocks.setdefault(mixer, []).append(i)
        self._base = self._table(None)
        self._kinds = {mixer: self._table(mixer) for mixer in self._blocks}

    def __call__(self, arch: Arch) -> float:
        """Predicted seconds of one decoding step. Widths must lie between the smallest and the largest that were named."""
        kept = (i for i, mixer in enumerate(arch.mixers) if mixer is not None)
        return self._base(arch) + sum(self._kinds[self.parent.mixers[i]](arch, i) for i in kept)

    def _table(self, mixer: Mixer | None) -> _Rows:
        knots = self._knots(mixer)
        points = list(itertools.product(*knots.values()))
        seconds = np.array([self._seconds(mixer, dict(zip(knots, point, strict=True))) for point in points])
        if not knots:
            return _Rows((), lambda widths: seconds[0])
        grid = RegularGridInterpolator(tuple(knots.values()), seconds.reshape([len(own) for own in knots.values()]))
        return _Rows(tuple(knots), lambda widths: grid(widths)[0])

    def _knots(self, mixer: Mixer | None) -> dict[str, tuple[int, ...]]:
        """Axis -> the widths to measure, of the axes that shrink."""
        own = {'embed': self.parent.embed}
        if mixer is not None:
            own |= axis_sizes(mixer)
        reach = {axis: sorted({min(width, full) for width in self._widths.get(axis, (full,))}) for axis, full in own.items()}
        reach = {axis: widths for axis, widths in reach.items() if len(widths) > 1}
        three = {axis: tuple(sorted({widths[0], widths[len(widths) // 2], widths[-1]})) for axis, widths in reach.items()}
        if np.prod([len(widths) for widths in three.values()], initial=1) <= KNOTS:
            return three
        return {axis: (widths[0], widths[-1]) for axis, widths in reach.items()}

    def _seconds(self, mixer: Mixer | None, widths: Mapping[str, int]) -> float:
        """Of one block at some widths; of no block, of the rest of the model."""
        embed = widths.get('embed', self.parent.embed)
        bare = self._measured((), embed)
        if mixer is None:
            return bare
        changes = {AXES[axis].field: width for axis, width in widths.items() if axis != 'embed'}
        blocks = self._blocks[mixer]
        # As many as make up the parent: weights that a whole model reads anew at every step must not stay in a small cache here.
        size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
        count = min(max(round(size(self.params) / size(self.params[layer_name(blocks[0])])), FEWEST), MOST)
        narrow = dataclasses.replace(mixer, **changes)
        whole = self._measured((narrow,) * count, embed, mixer, list(itertools.islice(itertools.cycle(blocks), count)))
        return (whole - bare) / count

    def _measured(
        self, mixers: tuple[Mixer, ...], embed: int, full: Mixer | None = None, taken_from: Sequence[int] = ()
    ) -> float:
        """Seconds of a step of a model of these blocks, cut from those of the parent."""
        child = dataclasses.replace(self.parent, embed=embed, mixers=mixers, unit_blocks=1, ranking=())
        name = f'{child.vocab}x{embed} {"tied " if child.tied else ""}{len(mixers)} x {mixers[0] if mixers else "no block"}'
        key = f'{name}; {self.layout if mixers else ""}; {self.rows} rows of {self.context}, {self.dtype.name}'

        def measure() -> float:
            parent = dataclasses.replace(child, embed=self.parent.embed, mixers=(full,) * len(mixers))
            params = {group: leaves for group, leaves in self.params.items() if not group.startswith('layer_')}
            params |= {layer_name(n): self.params[layer_name(i)] for n, i in enumerate(taken_from)}
            # By way of the host: nothing is compiled to cut, and no two blocks share memory.
            cut = jax.tree.map(jnp.array, slice_params(jax.device_get(params), parent, child, self.layout))
            self.say(f'timing {name}')
            return decode_seconds(weights_of(cut, child, self.layout, self.dtype), self.rows, self.context)

        return self.times.get(key, measure)
