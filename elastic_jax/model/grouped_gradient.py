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

from elastic_jax.model.tiles import MEMORY, ROW_TILE, SUBLANES, Chip, dot, tile_of, whole

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
    chip: Chip,
    onto: jax.Array | None = None,
) -> jax.Array:
    """Σ_r rows [r, f] · rows [r, d] over each expert's rows: [*blocks, F, D] in float32. Rows of nobody may hold anything.

    With `onto`, [blocks[0], E, F', D'], it is added in place to the leading corner of that.
    """
    count, visits = visits_of(start_E, end_E, rows_RxF.shape[0])
    return gradient_of(rows_RxF, rows_RxD, count, visits, blocks, place, chip, onto, add_visit)


def gradient_of(
    rows_RxF: jax.Array,
    rows_RxD: jax.Array,
    count: jax.Array | int,
    visits: Visits,
    blocks: tuple[int, int],
    place: Place,
    chip: Chip,
    onto: jax.Array | None,
    kernel: Callable[..., None],
) -> jax.Array:
    """`weight_gradient` by a kernel of one visit."""
    (rows, width), embed = rows_RxF.shape, rows_RxD.shape[1]
    out = jax.ShapeDtypeStruct((*blocks, width, embed) if onto is None else onto.shape, jnp.float32)
    stored_width, stored_embed = out.shape[2:]
    height, most = whole(width, stored_width, SUBLANES), min(MOST, rows)
    # Results, what they are added to, and rows: twice, as copies of the next ones overlap.
    of_result, of_row = (8 if onto is None else 16), 2 * rows_RxF.dtype.itemsize
    tile = tile_of(embed, stored_embed, of_result * height + of_row * most, chip.memory - of_row * most * width, times=2)
    read = lambda visits, v: visits.tile_V[v] * ROW_TILE
    padding = -embed % tile
    if chip.interpret:  # which does not pad where results are aliased; a chip reads there whatever it finds
        rows_RxD, padding = jnp.pad(rows_RxD, ((0, 0), (0, padding)), constant_values=jnp.nan), 0
    columns = pl.Element(tile, (0, padding))
    result = pl.BlockSpec((None, None, height, tile), lambda n, v, visits: (*place(visits.expert_V[v]), 0, n))

    def run(visits: Visits, rows_f, rows_d, *refs) -> None:
        added, out = (None, *refs) if onto is None else refs
        kernel(visits, rows_f, rows_d, added, out, most=most, embed=embed)

    call = pl.pallas_call(
        run,
        out_shape=out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-embed // tile), count),
            in_specs=[
                pl.BlockSpec((pl.Element(most), pl.Element(width)), lambda n, v, visits: (read(visits, v), 0)),
                pl.BlockSpec((pl.Element(most), columns), lambda n, v, visits: (read(visits, v), n * tile)),
                *([] if onto is None else [result]),
            ],
            out_specs=result,
        ),
        # Scalars count among the arguments.
        input_output_aliases={} if onto is None else {len(visits) + 2: 0},
        # Columns may be shared between a chip's cores; visits follow each other. Parts of sums lie beside blocks.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=MEMORY + MEMORY // 8
        ),
        interpret=chip.interpret,
        name='experts_gradient' if onto is None else 'experts_gradient_onto',
    )
    return call(visits, rows_RxF, rows_RxD, *([] if onto is None else [onto]))


def add_visit(visits: Visits, rows_f, rows_d, onto, out, *, most: int, embed: int) -> None:
    """The kernel: one visit. `onto` is what sums are added to, if anything."""
    v, width, tile = pl.program_id(1), rows_f.shape[1], rows_d.shape[1]
    # What lies beyond the columns that are used is somebody else's.
    columns = embed - pl.program_id(0) * tile if onto is not None and embed % tile else tile
    expert = visits.expert_V[v]
    begins = (v == 0) | (visits.expert_V[jnp.maximum(v - 1, 0)] != expert)
    needed, fewer = visits.end_V[v] - visits.tile_V[v] * ROW_TILE, -1
    for depth in sorted({min(depth, most) for depth in DEPTHS}):

        @pl.when((needed > fewer) & (needed <= depth))
        def _(depth: int = depth) -> None:
            add_product(visits, v, rows_f, rows_d, onto, out, begins, depth, columns)

        fewer = depth

    if onto is not None and out.shape[0] > width:

        @pl.when(begins)
        def _() -> None:
            out[width:] = onto[width:]


def add_product(
    visits: Visits, v: jax.Array, rows_f, rows_d, onto, out, begins: jax.Array, depth: int, columns: jax.Array | int
) -> None:
    """Adds that of the visit's own among the first `depth` rows that it read, and of the first `columns` of rows_d.

    Where it begins a sum, to `onto` or to nothing.
    """

    def mine(rows: jax.Array, columns: jax.Array | int) -> jax.Array:
        place = partial(jax.lax.broadcasted_iota, jnp.int32, rows.shape)
        row = visits.tile_V[v] * ROW_TILE + place(0)
        own = (row >= visits.first_V[v]) & (row < visits.end_V[v])
        if not isinstance(columns, int):
            own = own & (place(1) < columns)
        return jnp.where(own, rows, jnp.zeros((), rows.dtype))

    # Both sides: what belongs to nobody may be no number.
    product = dot(mine(rows_f[:depth], rows_f.shape[1]), mine(rows_d[:depth], columns), (0, 0))
    own = pl.ds(0, rows_f.shape[1])
    out[own] = jnp.where(begins, 0.0 if onto is None else onto[own], out[own]) + product
