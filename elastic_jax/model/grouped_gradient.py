"""The gradients of the experts' weights on TPU: of each expert the sum over its rows, of as many at a time as fit on the chip.

Adding a block of 128 rows' product to a sum of [F, D] moves more numbers than a matmul unit makes meanwhile. So a visit is of one
expert and up to `MOST` of its rows, from the tile in which they begin, and most experts have one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from elastic_jax.model.tiles import MEMORY, ROW_TILE, Chip, dot, even_tile

MOST = 512  # rows of a visit
DEPTHS = (256, 384, MOST)  # rows that are multiplied: the fewest that hold a visit's

# expert -> (block, place in it) of the parent's experts.
Place = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Visits(NamedTuple):
    """Visit v adds rows `first_V[v]` up to `end_V[v]` to expert `expert_V[v]`, and reads from row ROW_TILE · `tile_V[v]` on.

    Experts never go back. One without rows has one visit, in which its gradient becomes zero.
    """

    expert_V: jax.Array
    tile_V: jax.Array
    first_V: jax.Array
    end_V: jax.Array


def visits_of(start_E: jax.Array, end_E: jax.Array, rows: int) -> tuple[jax.Array, Visits]:
    """(how many of the visits are made, the visits) to experts that have rows `start_E` up to `end_E` of `rows`."""
    most, experts = min(MOST, rows), start_E.shape[0]
    begin_E = start_E // ROW_TILE * ROW_TILE
    count_E = jnp.maximum(-(-(end_E - begin_E) // most), 1)
    last_E = jnp.cumsum(count_E)
    # Each is at most one more than the whole blocks in its rows and in those of its first tile that are not its.
    step_V = jnp.arange(experts + (rows + (ROW_TILE - 1) * experts) // most)
    expert_V = jnp.minimum(jnp.searchsorted(last_E, step_V, side='right', method='compare_all'), experts - 1)
    from_V = begin_E[expert_V] + (step_V - (last_E - count_E)[expert_V]) * most
    first_V, end_V = jnp.maximum(start_E[expert_V], from_V), jnp.minimum(end_E[expert_V], from_V + most)
    read_V = jnp.clip(from_V, 0, rows - most)
    return last_E[-1], Visits(*(u.astype(jnp.int32) for u in (expert_V, read_V // ROW_TILE, first_V, end_V)))


def weight_gradient(
    rows_RxF: jax.Array,
    rows_RxD: jax.Array,
    start_E: jax.Array,
    end_E: jax.Array,
    blocks: tuple[int, int],
    place: Place,
    dtype: jnp.dtype,
    chip: Chip,
) -> jax.Array:
    """Σ_r rows [r, f] · rows [r, d] over each expert's rows: [*blocks, F, D]. Rows of nobody may hold anything."""
    count, visits = visits_of(start_E, end_E, rows_RxF.shape[0])
    return gradient_of(rows_RxF, rows_RxD, count, visits, blocks, place, dtype, chip, add_visit)


def gradient_of(
    rows_RxF: jax.Array,
    rows_RxD: jax.Array,
    count: jax.Array | int,
    visits: Visits,
    blocks: tuple[int, int],
    place: Place,
    dtype: jnp.dtype,
    chip: Chip,
    kernel: Callable[..., None],
) -> jax.Array:
    """`weight_gradient` by a kernel of one visit."""
    (rows, width), embed = rows_RxF.shape, rows_RxD.shape[1]
    most, of_row = min(MOST, rows), 2 * rows_RxF.dtype.itemsize
    # Sums; results and rows twice, as copies of the next ones overlap.
    of_column = (4 + 2 * jnp.dtype(dtype).itemsize) * width + of_row * most
    tile = even_tile(embed, embed, of_column, chip.memory - of_row * most * width)
    read = lambda visits, v: visits.tile_V[v] * ROW_TILE
    padding = (0, -embed % tile)
    call = pl.pallas_call(
        partial(kernel, most=most),
        out_shape=jax.ShapeDtypeStruct((*blocks, width, embed), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-embed // tile), count),
            in_specs=[
                pl.BlockSpec((pl.Element(most), pl.Element(width)), lambda n, v, visits: (read(visits, v), 0)),
                pl.BlockSpec((pl.Element(most), pl.Element(tile, padding)), lambda n, v, visits: (read(visits, v), n * tile)),
            ],
            out_specs=pl.BlockSpec((None, None, width, tile), lambda n, v, visits: (*place(visits.expert_V[v]), 0, n)),
            scratch_shapes=[pltpu.VMEM((width, tile), jnp.float32)],
        ),
        # Columns may be shared between a chip's cores; visits follow each other.
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=MEMORY),
        interpret=chip.interpret,
        name='experts_gradient',
    )
    return call(visits, rows_RxF, rows_RxD)


def add_visit(visits: Visits, rows_f, rows_d, out, total, *, most: int) -> None:
    """The kernel: one visit."""
    v, end = pl.program_id(1), pl.num_programs(1) - 1
    expert = visits.expert_V[v]
    begins = (v == 0) | (visits.expert_V[jnp.maximum(v - 1, 0)] != expert)
    needed, fewer = visits.end_V[v] - visits.tile_V[v] * ROW_TILE, -1
    for depth in sorted({min(depth, most) for depth in DEPTHS}):

        @pl.when(begins & (needed > fewer) & (needed <= depth))
        def _(depth: int = depth) -> None:
            total[...] = product(visits, v, rows_f, rows_d, depth)

        fewer = depth

    @pl.when(~begins)
    def _() -> None:
        total[...] += product(visits, v, rows_f, rows_d, most)

    @pl.when((v == end) | (visits.expert_V[jnp.minimum(v + 1, end)] != expert))
    def _() -> None:
        out[...] = total[...].astype(out.dtype)


def product(visits: Visits, v: jax.Array, rows_f, rows_d, depth: int) -> jax.Array:
    """Of the visit's own among the first `depth` rows that it read."""

    def mine(rows) -> jax.Array:
        row = visits.tile_V[v] * ROW_TILE + jax.lax.broadcasted_iota(jnp.int32, (depth, rows.shape[1]), 0)
        own = (row >= visits.first_V[v]) & (row < visits.end_V[v])
        return jnp.where(own, rows[:depth], jnp.zeros((), rows.dtype))

    # Both sides: what belongs to nobody may be no number.
    return dot(mine(rows_f), mine(rows_d), (0, 0))
