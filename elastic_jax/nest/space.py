"""The sizes between those that were trained: a grid of legal widths, and the way through it from one size to another."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from elastic_jax.arch import AXES, Arch, unknown_name
from elastic_jax.errors import UserError
from elastic_jax.layout import FLAT, Layout
from elastic_jax.nest.budgets import Grid, Point, axis_step, fitted, make_grid, point_arch

Flat = tuple[int, ...]  # the index of the choice in every row, in the grid's order
CostOf = Callable[[Arch], float]


@dataclasses.dataclass(frozen=True)
class Space:
    """All sizes on a grid. Every one of them nests in the parent and respects the layout that the grid was made for."""

    parent: Arch
    grid: Grid

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of choices of every row."""
        return tuple(len(choices.widths) for choices in self.grid for _ in range(choices.rows))

    @property
    def size(self) -> int:
        return math.prod(self.counts)

    def points(self) -> Iterator[Flat]:
        return itertools.product(*map(range, self.counts))

    def arch(self, flat: Flat) -> Arch:
        point: Point = {}
        rest = iter(flat)
        for choices in self.grid:
            point[choices.axis] = tuple(itertools.islice(rest, choices.rows))
        return point_arch(self.parent, self.grid, point)

    def row_widths(self, arch: Arch) -> tuple[float, ...]:
        """The mean width of every row's blocks; of a row whose blocks are all dropped, the parent's."""
        found: list[float] = []
        for choices in self.grid:
            if AXES[choices.axis].kind is None:
                found.append(getattr(arch, choices.axis))
                continue
            own = arch.layer_widths(choices.axis)
            for blocks in [(i,) for i in choices.blocks] if choices.per_layer else [choices.blocks]:
                kept = [own[i] for i in blocks if i in own]
                found.append(sum(kept) / len(kept) if kept else choices.widths[0])
        return tuple(found)

    def nearest(self, row_widths: Sequence[float]) -> Flat:
        """The point whose widths are nearest, row by row; the larger of two that are equally near."""
        rows = [choices.widths for choices in self.grid for _ in range(choices.rows)]
        near = lambda widths, width: min(range(len(widths)), key=lambda n: (abs(widths[n] - width), n))
        return tuple(near(widths, width) for widths, width in zip(rows, row_widths, strict=True))

    def flat_of(self, arch: Arch) -> Flat | None:
        """The point of a size; None when it is not on the grid."""
        flat = self.nearest(self.row_widths(arch))
        return flat if self.arch(flat) == arch else None

    def moves(self, flat: Flat) -> list[Flat]:
        """The points one choice away in one row."""
        return [
            (*flat[:row], index + step, *flat[row + 1 :])
            for row, (index, count) in enumerate(zip(flat, self.counts, strict=True))
            for step in (-1, 1)
            if 0 <= index + step < count
        ]

    def between(self, large: Arch, small: Arch) -> list[Flat]:
        """The points along the straight line of widths from one size to another, each nested in the one before."""
        top, bottom = self.row_widths(large), self.row_widths(small)
        turns = {0.0, 1.0}
        rows = [choices.widths for choices in self.grid for _ in range(choices.rows)]
        for widths, start, end in zip(rows, top, bottom, strict=True):
            if start != end:
                turns |= {((a + b) / 2 - start) / (end - start) for a, b in itertools.pairwise(widths)}
        shares = sorted(turn for turn in turns if 0 <= turn <= 1)
        line = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(shares)), 1.0]
        at = lambda share: self.nearest([start + share * (end - start) for start, end in zip(top, bottom, strict=True)])
        return list(dict.fromkeys(map(at, line)))


def make_space(
    parent: Arch,
    trained: Sequence[Arch],
    run_grid: Grid = (),
    layout: Layout = FLAT,
    *,
    axes: Sequence[str] = (),
    per_layer: bool = False,
    resolution: int = 8,
    multiple: int = 1,
) -> Space:
    """The grid between the parent and the smallest widths that were trained.

    Args:
      trained: the checkpoint's sizes. run_grid: the choices that its router had, if it had any.
      axes: the axes to walk (default: those that a trained size cuts or the router could; where none does, all but depth).
      per_layer: whether every block chooses for itself. resolution: about how many widths of each axis there are.
      multiple: what channel widths are multiples of, as in `make_grid`; trained widths stay as they are.
    Raises: UserError for an axis that the parent does not have.
    """
    own = [axis.name for axis in parent.axes()]
    for name in axes:
        if name not in own:
            raise UserError(unknown_name('axis', name, own))
    known = {choices.axis: set(choices.widths) for choices in run_grid}
    for arch in trained:
        for name in own:
            known.setdefault(name, set()).update(_widths(arch, name))
    cut = [name for name in own if len(known.get(name, ())) > 1]
    chosen = [name for name in own if name in (axes or cut or set(own) - {'layers'})]
    widths = {name: _spread(parent, name, known[name], layout, resolution, multiple) for name in chosen}
    rows = [name for name in chosen if AXES[name].kind is not None] if per_layer else []
    return Space(parent, make_grid(parent, widths, rows, layout))


def _widths(arch: Arch, name: str) -> set[int]:
    return {getattr(arch, name)} if AXES[name].kind is None else set(arch.layer_widths(name).values())


def _spread(parent: Arch, name: str, known: set[int], layout: Layout, resolution: int, multiple: int) -> list[int]:
    """The known widths, and legal ones evenly between the smallest of them (of one alone: its half) and the largest."""
    full, step = max(_widths(parent, name)), axis_step(parent, name, layout, multiple)
    low = min(known) if len(known) > 1 else full / 2
    even = {round((low + (full - low) * n / resolution) / step) * step for n in range(resolution + 1)}
    legal = []
    for width in sorted(known | {width for width in even if low <= width <= full}):
        try:
            parent.narrow(fitted(parent, name, width))  # too few experts to choose from, say
        except UserError:
            continue
        legal.append(width)
    return legal


def at_cost(space: Space, line: Sequence[Flat], target: float, cost: CostOf, tolerance: float = 0.02) -> tuple[Arch, float]:
    """(the size, its miss) nearest to a cost: from the nearest point of `line` by single moves that come nearer.

    The miss is cost / target - 1; it is beyond `tolerance` only where no move comes nearer.
    """
    miss = lambda flat: cost(space.arch(flat)) / target - 1.0
    best = min(line, key=lambda flat: abs(miss(flat)))
    while abs(miss(best)) > tolerance:
        nearer = min(space.moves(best), key=lambda flat: abs(miss(flat)), default=best)
        if abs(miss(nearer)) >= abs(miss(best)):
            break
        best = nearer
    return space.arch(best), miss(best)


def trained_line(space: Space, trained: Mapping[str, Arch], cost: CostOf) -> list[Flat]:
    """The points from the parent through every trained size to the smallest; of a parent alone, to the smallest on the grid."""
    sizes = sorted({space.parent, *trained.values()}, key=cost, reverse=True)
    if len(sizes) == 1:
        sizes.append(space.arch(tuple(count - 1 for count in space.counts)))
    return list(dict.fromkeys(flat for large, small in itertools.pairwise(sizes) for flat in space.between(large, small)))
