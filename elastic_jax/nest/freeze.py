"""Freezing: from the router's probabilities to one Arch per budget that nests, is on the grid and meets its budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.arch import Arch
from elastic_jax.nest.budgets import Grid, Metric, Point, full_point, point_arch
from elastic_jax.nest.router import Router, interpolate, router_logits


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A budget's submodel: what was asked, what the argmax would have cost, what was taken, and why it misses if it does."""

    arch: Arch
    target: float
    argmax_share: float
    share: float
    note: str = ''

    @property
    def miss(self) -> float:
        return self.share / self.target - 1.0


def freeze(
    router: Router, grid: Grid, parent: Arch, targets: Mapping[str, float], measure: Metric, tolerance: float = 0.05
) -> dict[str, Frozen]:
    """The Arch of every trained budget, largest first; each nests in the one before it.

    Argmax without Gumbel noise, then, where that misses the budget by more than `tolerance`, the steps along the grid that
    give up the least probability for the cost they change.
    """
    frozen: dict[str, Frozen] = {}
    bound = full_point(grid)
    for i, (name, target) in enumerate(targets.items()):
        one_hot = [float(i == j) for j in range(len(targets))]
        if target >= 1.0:
            frozen[name] = Frozen(parent, target, 1.0, 1.0)
            continue
        frozen[name], bound = _freeze_one(router, grid, parent, one_hot, target, measure, tolerance, bound)
    return frozen


def freeze_between(
    router: Router,
    grid: Grid,
    parent: Arch,
    targets: Mapping[str, float],
    target: float,
    measure: Metric,
    tolerance: float = 0.02,
) -> Frozen:
    """The Arch for a budget between the trained ones, from the router's interpolated logits."""
    weights = interpolate(targets, target)
    return _freeze_one(router, grid, parent, weights, target, measure, tolerance, full_point(grid))[0]


def _freeze_one(
    router: Router,
    grid: Grid,
    parent: Arch,
    budget: Sequence[float],
    target: float,
    measure: Metric,
    tolerance: float,
    bound: Point,
) -> tuple[Frozen, Point]:
    logits = router_logits(router, grid, jnp.asarray(budget, jnp.float32))
    log_p = {axis: np.asarray(jax.nn.log_softmax(value, axis=-1)) for axis, value in logits.items()}
    # Nesting in the larger budget: choices fall, so a smaller width has a larger index.
    point = {
        choices.axis: tuple(
            int(low + np.argmax(row[low:])) for row, low in zip(log_p[choices.axis], bound[choices.axis], strict=True)
        )
        for choices in grid
    }
    whole = float(measure(parent, None))
    share_of = lambda p: float(measure(point_arch(parent, grid, p), None)) / whole
    argmax_share = share = share_of(point)
    note = ''
    while abs(share / target - 1.0) > tolerance:
        step = _best_step(point, share, target, grid, log_p, bound, share_of)
        if step is None:
            side = 'smaller' if share > target else 'larger'
            note = f'no {side} point of the grid is nearer: add choices between those there are'
            break
        point, share = step
    return Frozen(point_arch(parent, grid, point), target, argmax_share, share, note), point


def _best_step(
    point: Point,
    share: float,
    target: float,
    grid: Grid,
    log_p: dict[str, np.ndarray],
    bound: Point,
    share_of: Callable[[Point], float],
) -> tuple[Point, float] | None:
    """The change that comes nearer to the target and loses least log-probability for the cost it changes.

    One row moves by one choice; where no such move comes nearer, one row moves that way and another the other way.
    """
    direction = 1 if share > target else -1
    moves = list(_moves(point, grid, bound, direction))
    best = _cheapest(point, share, target, moves, log_p, share_of)
    if best is None:
        pairs = [(*one, *two) for one in moves for two in _moves(point, grid, bound, -direction) if one[0][:2] != two[0][:2]]
        best = _cheapest(point, share, target, pairs, log_p, share_of)
    return best


Move = tuple[tuple[str, int, int], ...]  # (axis, row, new choice) of every row that moves


def _moves(point: Point, grid: Grid, bound: Point, direction: int) -> Iterator[Move]:
    for choices in grid:
        for row, index in enumerate(point[choices.axis]):
            if bound[choices.axis][row] <= index + direction < len(choices.widths):
                yield ((choices.axis, row, index + direction),)


def _cheapest(
    point: Point,
    share: float,
    target: float,
    moves: Sequence[Move],
    log_p: dict[str, np.ndarray],
    share_of: Callable[[Point], float],
) -> tuple[Point, float] | None:
    best, best_price = None, np.inf
    for move in moves:
        candidate, lost = dict(point), 0.0
        for axis, row, choice in move:
            indices = candidate[axis]
            candidate[axis] = (*indices[:row], choice, *indices[row + 1 :])
            lost += log_p[axis][row, indices[row]] - log_p[axis][row, choice]
        new_share = share_of(candidate)
        if abs(new_share - target) < abs(share - target) and lost / abs(new_share - share) < best_price:
            best, best_price = (candidate, new_share), lost / abs(new_share - share)
    return best
