"""Every size of one checkpoint against its cost: candidates between the trained budgets, a short search, the frontier.

ckpt = elastic_jax.open_checkpoint('runs/quickstart')
frontier = find_frontier(ckpt, cost='active')
frontier.write('out')
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax import cost as costs
from elastic_jax.api import Checkpoint
from elastic_jax.arch import Arch, unknown_name
from elastic_jax.checkpoint.restore import restore_slice
from elastic_jax.checkpoint.tree_reader import read_tree
from elastic_jax.errors import UserError, WorkError
from elastic_jax.evaluate.frontier_files import COSTS, Frontier, FrontierRow
from elastic_jax.evaluate.masked import evaluate_masked
from elastic_jax.evaluate.perplexity import evaluate
from elastic_jax.evaluate.summary import duration, format_widths
from elastic_jax.infer.latency import LatencyTable, Times, decode_seconds, default_table
from elastic_jax.infer.resident import weights_of
from elastic_jax.layout import Layout
from elastic_jax.nest.budgets import Grid, make_grid
from elastic_jax.nest.freeze import freeze_between
from elastic_jax.nest.search import Candidate, Pool, search
from elastic_jax.nest.slice import slice_params
from elastic_jax.nest.space import CostOf, Space, at_cost, make_space, trained_line
from elastic_jax.train.config import default_config

Say = Callable[[str], None]
BOUNDS = {'points': 1, 'evaluations': 1, 'context': 2, 'batches': 1, 'rows': 1, 'cost_context': 1}


def find_frontier(
    checkpoint: Checkpoint,
    cost: str = 'parameters',
    *,
    data: Sequence[str] = (),
    points: int = 8,
    evaluations: int = 64,
    per_layer: bool = False,
    axes: Sequence[str] = (),
    context: int = 256,
    batches: int = 8,
    rows: int = 1,
    cost_context: int | None = None,
    dtype: str | None = None,
    latency_table: str | None = None,
    seed: int = 0,
    tolerance: float = 0.02,
    say: Say = lambda line: None,
) -> Frontier:
    """The frontier of a checkpoint's sizes.

    `points` costs evenly between the smallest trained budget's and the parent's are aimed at by interpolation, of the router
    (where the run had one) and of the trained widths; what is left of `evaluations` is searched. All are scored under masks by
    one program; up to `points` of the frontier, evenly over the costs, and the trained budgets are run as slices as well.

    Args:
      cost: a key of COSTS. data: files to score on (default: the run's held-out data).
      per_layer: also sizes whose blocks differ, from half of the search. axes: the axes to walk (`make_space`), not the router's.
      context, batches: of the text: tokens of a row, and batches of 8 rows of each file.
      rows, cost_context, dtype: what memory and latency are counted for: sequences served together, tokens that their caches
        hold (default: as the checkpoint's costs), and the dtype served in (default: bfloat16; for latency on a CPU float32).
      latency_table: the file of layer times. tolerance: how far an interpolated size's cost may be from its target unsaid.
    """
    given = {'points': points, 'evaluations': evaluations, 'context': context, 'batches': batches, 'rows': rows}
    for name, value in {**given, **({} if cost_context is None else {'cost_context': cost_context})}.items():
        if value < BOUNDS[name]:
            raise UserError(f'{name}={value} must be at least {BOUNDS[name]}')
    if cost not in COSTS:
        raise UserError(unknown_name('cost', cost, list(COSTS)))
    own_context = next(iter(checkpoint.budgets.values())).costs.get('context', 4096)
    serving = _Serving(rows, cost_context or own_context, _serving_dtype(cost, dtype))
    parent, layout = checkpoint.arch, checkpoint.layout
    trained = {name: budget.arch for name, budget in checkpoint.budgets.items()}
    run_grid, multiple = _run_grid(checkpoint)
    spaces = [
        make_space(parent, [parent, *trained.values()], run_grid, layout, axes=axes, per_layer=by_layer, multiple=multiple)
        for by_layer in (False, True)
    ]
    heldout = [batch for file in data or (None,) for batch in checkpoint.heldout(file, context, batches=batches)]
    times = Times(Path(latency_table) if latency_table else default_table()) if cost == 'latency' else None
    params, measure, served = restore_slice(checkpoint.path, parent, None, jnp.float32), serving.measure(cost), None
    if times:
        served = restore_slice(checkpoint.path, parent, None, serving.dtype)
        widths = reach([parent, *trained.values()], [spaces[0].grid, run_grid])
        options = {'rows': rows, 'context': serving.context, 'dtype': serving.dtype, 'say': say}
        measure = LatencyTable(served, parent, widths, layout, times, **options)
        say(f'layer times of this device: {times.measured} measured, {times.reused} from {times.path}')

    bits = lambda params, arch: evaluate_masked(params, parent, arch, heldout, layout)['bits_per_byte']
    pool = Pool(measure, _Scoring(lambda arch: bits(params, arch), evaluations, say))
    for name, arch in trained.items():
        pool.add(arch, 'trained', name)
    pool.add(parent, 'full')
    by_router = None if axes else _router(checkpoint, run_grid, trained, pool)
    _interpolate(pool, spaces[0], by_router, trained, points, tolerance, say)
    least = min(pool.cost(arch) for arch in trained.values()) if len(set(trained.values())) > 1 else 0.0
    left = lambda: max(0, evaluations - len(pool.found))
    search(pool, spaces[0], 'search', left() // 2 if per_layer else left(), seed, least)
    if per_layer:
        search(pool, spaces[1], 'per layer', left(), seed, least)

    best, found = pool.frontier(), sorted(pool.found.values(), key=lambda one: (one.cost, one.score))
    confirmed = dict.fromkeys([*_chosen(best, points), *(one for one in found if one.name)])
    say(f'running {len(confirmed)} sizes as slices')
    slices: dict[Arch, tuple[float, float | None]] = {}
    for one in confirmed:
        score = evaluate(slice_params(params, parent, one.arch, layout), one.arch, heldout)['bits_per_byte']
        slices[one.arch] = score, serving.seconds(served, parent, one.arch, layout) if served else None
    frozen = _frozen_parent(checkpoint)
    return Frontier(
        cost,
        serving.how(cost),
        str(checkpoint.path),
        checkpoint.manifest.step,
        [_row(one, one in best, serving, *slices.get(one.arch, (None, None))) for one in found],
        pool.cost(parent),
        bits(frozen, parent) if frozen else None,
    )


class _Scoring:
    """Scores sizes and says how far that is."""

    def __init__(self, score: Callable[[Arch], float], evaluations: int, say: Say):
        self.score, self.evaluations, self.say = score, evaluations, say
        self.done, self.begun = 0, time.monotonic()

    def __call__(self, arch: Arch) -> float:
        bits = self.score(arch)
        self.done += 1
        of = max(self.evaluations, self.done)
        left = (time.monotonic() - self.begun) / self.done * (of - self.done)
        self.say(f'scored {self.done} of {of}: {bits:.4f} bits per byte, {duration(left)} left')
        return bits if math.isfinite(bits) else math.inf


class _Serving:
    """What costs are counted for."""

    def __init__(self, rows: int, context: int, dtype: Any):
        self.rows, self.context, self.dtype = rows, context, dtype

    def memory(self, arch: Arch) -> float:
        size = float(self.dtype.itemsize)
        return float(costs.memory_bytes(arch, self.context, self.rows, size, size))

    def flops(self, arch: Arch) -> float:
        return float(costs.flops_per_token(arch, self.context))

    def seconds(self, params: Any, parent: Arch, arch: Arch, layout: Layout) -> float:
        """Of a decoding step of a slice, measured."""
        weights = weights_of(slice_params(params, parent, arch, layout), arch, layout, self.dtype)
        return decode_seconds(weights, self.rows, self.context)

    def measure(self, cost: str) -> CostOf:
        """The cost of a size in closed form."""
        closed = {'parameters': costs.parameters, 'active': costs.active_parameters, 'memory': self.memory, 'flops': self.flops}
        return closed.get(cost, self.memory)

    def how(self, cost: str) -> str:
        served = f'{self.dtype.name}, {self.rows} x {self.context} tokens'
        return {'memory': served, 'latency': f'{served}, predicted', 'flops': f'{self.context} tokens'}.get(cost, '')


def _serving_dtype(cost: str, dtype: str | None) -> Any:
    own = dtype or ('float32' if cost == 'latency' and jax.default_backend() == 'cpu' else 'bfloat16')
    if own not in ('bfloat16', 'float32'):
        raise UserError(unknown_name('dtype', own, ['bfloat16', 'float32']))
    return jnp.dtype(own)


def _run_grid(checkpoint: Checkpoint) -> tuple[Grid, int]:
    """(the choices that the router of the checkpoint's run had, what channel widths are multiples of there)."""
    path = checkpoint.path.parent.parent / 'config.json'
    config = json.loads(path.read_text()) if path.exists() else {}
    choices, multiple = config.get('choices', {}), config.get('choice_multiple', default_config().choice_multiple)
    grid = make_grid(checkpoint.arch, choices, config.get('per_layer', ()), checkpoint.layout, multiple) if choices else ()
    return grid, multiple


def reach(archs: Sequence[Arch], grids: Sequence[Grid]) -> dict[str, set[int]]:
    """Axis -> all widths that some sizes have, or points of some grids."""
    widths: dict[str, set[int]] = {'embed': {arch.embed for arch in archs}}
    for arch in archs:
        for axis in arch.axes():
            widths.setdefault(axis.name, set()).update(arch.layer_widths(axis.name).values())
    for choices in (choices for grid in grids for choices in grid):
        widths.setdefault(choices.axis, set()).update(choices.widths)
    return widths


def _interpolate(
    pool: Pool,
    space: Space,
    by_router: Callable[[float, float], Arch] | None,
    trained: Mapping[str, Arch],
    points: int,
    tolerance: float,
    say: Say,
) -> None:
    """Adds the sizes at evenly spaced costs, by the router and along the line of trained widths."""
    line = trained_line(space, trained, pool.cost)
    ends = [pool.cost(space.arch(flat)) for flat in line]
    low, high = min(ends), max(ends)
    for n in range(1, points + 1):
        target = low + (high - low) * n / (points + 1)
        arch, miss = at_cost(space, line, target, pool.cost, tolerance)
        if abs(miss) > tolerance:
            say(f'no size on the grid is nearer than {100 * miss:+.1f} % to a cost of {target:.4g}')
        pool.add(arch, 'between', target=target)
        if by_router:
            pool.add(by_router(target, tolerance), 'router', target=target)


def _router(checkpoint: Checkpoint, grid: Grid, trained: Mapping[str, Arch], pool: Pool) -> Callable[[float, float], Arch] | None:
    """(target cost, tolerance) -> the size that the router's interpolated logits choose; None where the run kept no router."""
    names = list(checkpoint.manifest.extra.get('targets', ()))
    folder = checkpoint.path / 'router'
    if not grid or not folder.exists() or set(names) - set(trained):
        return None
    whole = pool.cost(checkpoint.arch)
    shares = {name: pool.cost(trained[name]) / whole for name in names}
    if list(shares.values()) != sorted(shares.values(), reverse=True):
        return None  # in this cost the budgets have another order than the router knows
    router = read_tree(folder)
    measure = lambda arch, keep: pool.cost(arch)
    return lambda target, tolerance: (
        freeze_between(router, grid, checkpoint.arch, shares, target / whole, measure, tolerance).arch
    )


def _chosen(best: Sequence[Candidate], points: int) -> list[Candidate]:
    """At most `points` of the frontier, evenly over its costs, both ends among them. Raises WorkError where there is none."""
    if not best:
        raise WorkError('no size scores a finite number of bits on the text: the parameters are damaged; use another checkpoint')
    low, high = best[0].cost, best[-1].cost
    aims = [low + (high - low) * n / max(1, points - 1) for n in range(points)]
    return list(dict.fromkeys(min(best, key=lambda one: abs(one.cost - aim)) for aim in aims))


def _row(one: Candidate, frontier: bool, serving: _Serving, sliced: float | None, measured: float | None) -> FrontierRow:
    return FrontierRow(
        frontier=frontier,
        name=one.name,
        origin=one.origin,
        cost=one.cost,
        bits_per_byte=one.score,
        parameters=round(costs.parameters(one.arch)),
        active_parameters=round(costs.active_parameters(one.arch)),
        memory_bytes=round(serving.memory(one.arch)),
        flops_per_token=round(serving.flops(one.arch)),
        widths=format_widths(one.arch.widths()),
        target=one.target,
        sliced_bits_per_byte=sliced,
        measured_latency=measured,
    )


def _frozen_parent(checkpoint: Checkpoint) -> Any:
    """The parameters of the run's frozen parent; None where the run did not keep it, or it is of other widths."""
    folder = checkpoint.path.parent.parent / 'parent'
    if not (folder / 'manifest').exists() or Checkpoint(folder).arch != checkpoint.arch:
        return None
    return restore_slice(folder, checkpoint.arch, None, jnp.float32)
