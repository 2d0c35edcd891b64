"""The experts' matmuls on TPU: rows sorted by expert, each by its own expert's weights, read in place.

An expert's weights lie as [F, D] in the parent's array [G, E, F, D], into the expert and out of it. A budget's are the leading
corner [G, e, f, d] of that, and the kernels read only those tiles of it: cutting the corner out would copy, in every pass and for
every budget, as many bytes as the matmuls read. The grid visits every block of rows once for each expert that has rows in it (as
MegaBlocks does, arXiv 2211.15841), with one expert's weights on the chip until the next one's turn; a visit multiplies the
expert's own rows and few others, whatever the block's size. Two cores share the blocks that have rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from elastic_jax.model.grouped_gradient import weight_gradient
from elastic_jax.model.tiles import LANES, MEMORY, ROW_TILE, Chip, dot, tile_of, whole

ROWS = 128  # their number is a multiple
BLOCKS = (1024, 512, 256, 128, 64)  # rows of a block
STEP = 64  # rows that are multiplied at once: as few as matmul units take at full speed


@dataclasses.dataclass(frozen=True)
class Corner:
    """What a budget uses of the parent's experts [G, E, F, D]: in each block the first `experts`, of those [width, embed]."""

    experts: int
    width: int
    embed: int

    def of(self, w_GxExFxD: jax.Array) -> jax.Array:
        """It cut out, the blocks merged: [G·e, f, d]."""
        return w_GxExFxD[:, : self.experts, : self.width, : self.embed].reshape(-1, self.width, self.embed)

    def place(self, expert: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(block, place in it) of one of the experts of the corner."""
        return jax.lax.div(expert, self.experts), jax.lax.rem(expert, self.experts)


class Visits(NamedTuple):
    """Of half h of the blocks, visit v is of block `block_HxV[h, v]` of rows to expert `expert_HxV[h, v]`; `count_H[h]` are made.

    Blocks and experts never go back. An expert's rows are `start_E` up to `end_E`.
    """

    expert_HxV: jax.Array
    block_HxV: jax.Array
    count_H: jax.Array
    start_E: jax.Array
    end_E: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=['count', 'visits'], meta_fields=['block'])
@dataclasses.dataclass(frozen=True)
class Grid:
    """`count` steps, as many as either half has visits, by blocks of `block` rows."""

    count: jax.Array
    visits: Visits
    block: int


def block_of(corner: Corner, rows: int, itemsize: int, chip: Chip) -> int:
    """Rows of a block, of which there are at least two: what half of the memory holds, as copies of the next ones overlap."""
    fits = chip.memory // (4 * itemsize * (corner.width + corner.embed))
    return min(next((block for block in BLOCKS if block <= fits), BLOCKS[-1]), rows // 2)


def grid_of(sizes_E: jax.Array, rows: int, block: int) -> Grid:
    """Of `rows` rows, a multiple of ROWS, sorted by expert, of which each has `sizes_E`; any left over belong to nobody."""
    experts, blocks = sizes_E.shape[0], -(-rows // block)
    end_E = jnp.cumsum(sizes_E)
    start_E = end_E - sizes_E
    first_E, after_E = start_E // block, jnp.where(sizes_E > 0, -(-end_E // block), start_E // block)
    last_E = jnp.cumsum(after_E - first_E)
    # Halves share no block, as each core writes whole ones. One without visits has its first block to itself.
    middle = jnp.maximum(-(-end_E[-1] // (2 * block)), 1)
    earlier = jnp.clip(jnp.minimum(after_E, middle) - first_E, 0).sum()
    count_H = jnp.stack([earlier, last_E[-1] - earlier])
    step_HxV = jnp.minimum(jnp.arange(blocks + experts - 1)[None], jnp.maximum(count_H - 1, 0)[:, None])
    step_HxV = step_HxV + jnp.stack([0, earlier])[:, None]
    expert_HxV = jnp.minimum(jnp.searchsorted(last_E, step_HxV, side='right', method='compare_all'), experts - 1)
    block_HxV = after_E[expert_HxV] + step_HxV - last_E[expert_HxV]
    block_HxV = jnp.where(count_H[:, None] > 0, block_HxV, jnp.stack([0, middle])[:, None])
    visits = Visits(*(u.astype(jnp.int32) for u in (expert_HxV, block_HxV, count_H, start_E, end_E)))
    return Grid(jnp.maximum(count_H.max(), 1).astype(jnp.int32), visits, block)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def into_experts(
    corner: Corner, chip: Chip, last: bool, rows_RxD: jax.Array, w_GxExFxD: jax.Array, total: jax.Array, grid: Grid
) -> tuple[jax.Array, jax.Array]:
    """(rows [R, d] by their experts' transposed weights: [R, f], total). Rows that belong to nobody are undefined, in gradients
    too. `total`, which has the weights' gradient, and `last` are a Summed's.
    """
    return product_of(corner, chip, rows_RxD, w_GxExFxD, grid, True, multiply_rows), total


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def out_of_experts(
    corner: Corner, chip: Chip, last: bool, rows_RxF: jax.Array, w_GxExFxD: jax.Array, total: jax.Array, grid: Grid
) -> tuple[jax.Array, jax.Array]:
    """(rows [R, f] by their experts' weights: [R, d], total); as `into_experts` otherwise."""
    return product_of(corner, chip, rows_RxF, w_GxExFxD, grid, False, multiply_rows), total


def _into_forward(corner, chip, last, rows, w, total, grid):
    return into_experts(corner, chip, last, rows, w, total, grid), (rows, w, grid)


def _into_backward(corner, chip, last, saved, grads):
    (rows_RxD, w, grid), (grad_RxF, total) = saved, grads
    d_rows = product_of(corner, chip, grad_RxF, w, grid, False, multiply_rows)
    return d_rows, None, _weight_gradient(corner, chip, last, grad_RxF, rows_RxD, total, grid), None


def _out_forward(corner, chip, last, rows, w, total, grid):
    return out_of_experts(corner, chip, last, rows, w, total, grid), (rows, w, grid)


def _out_backward(corner, chip, last, saved, grads):
    (rows_RxF, w, grid), (grad_RxD, total) = saved, grads
    d_rows = product_of(corner, chip, grad_RxD, w, grid, True, multiply_rows)
    return d_rows, None, _weight_gradient(corner, chip, last, rows_RxF, grad_RxD, total, grid), None


into_experts.defvjp(_into_forward, _into_backward)
out_of_experts.defvjp(_out_forward, _out_backward)


def product_of(
    corner: Corner,
    chip: Chip,
    rows_RxC: jax.Array,
    w_GxExFxD: jax.Array,
    grid: Grid,
    into: bool,
    kernel: Callable[..., None],
) -> jax.Array:
    """What `into_experts` or `out_of_experts` returns, by a kernel of one visit."""
    rows, depth = rows_RxC.shape
    stored_width, stored_embed = w_GxExFxD.shape[2:]
    columns, stored = (corner.width, stored_width) if into else (corner.embed, stored_embed)
    other = whole(depth, stored_embed, LANES) if into else whole(depth, stored_width, ROW_TILE)
    tile = tile_of(columns, stored, 2 * other * w_GxExFxD.dtype.itemsize, chip.memory // 2)
    if into:
        shape, place, over = (tile, other), lambda n: (n, 0), (1, 1)
    else:
        shape, place, over = (other, tile), lambda n: (0, n), (1, 0)
    block = lambda h, v, visits: visits.block_HxV[h, v]
    expert = lambda h, n, v, visits: (*corner.place(visits.expert_HxV[h, v]), *place(n))
    call = pl.pallas_call(
        partial(kernel, depth=depth, over=over),
        out_shape=jax.ShapeDtypeStruct((rows, columns), rows_RxC.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(2, -(-columns // tile), grid.count),
            in_specs=[
                pl.BlockSpec((grid.block, depth), lambda h, n, v, visits: (block(h, v, visits), 0)),
                pl.BlockSpec((None, None, *shape), expert),
            ],
            out_specs=pl.BlockSpec((grid.block, min(tile, columns)), lambda h, n, v, visits: (block(h, v, visits), n)),
        ),
        # Halves may be shared between a chip's cores; visits follow each other.
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary'), vmem_limit_bytes=MEMORY),
        interpret=chip.interpret,
        name='experts_into' if into else 'experts_out',
    )
    return call(grid.visits, rows_RxC, w_GxExFxD)


def multiply_rows(visits: Visits, rows, w, out, *, depth: int, over: tuple[int, int]) -> None:
    """The kernel: one visit."""
    h, v = pl.program_id(0), pl.program_id(2)
    expert, before = visits.expert_HxV[h, v], visits.block_HxV[h, v] * rows.shape[0]
    first = jnp.maximum(visits.start_E[expert] - before, 0)
    last = jnp.minimum(visits.end_E[expert] - before, rows.shape[0])
    begin = first - jax.lax.rem(first, ROW_TILE)

    @pl.when(v < visits.count_H[h])
    def _() -> None:
        steps = jax.lax.div(last - begin + STEP - 1, STEP)
        jax.lax.fori_loop(0, steps, lambda n, _: multiply(begin + n * STEP, first, last, rows, w, out, depth, over), None)


def multiply(start: jax.Array, first: jax.Array, last: jax.Array, rows, w, out, depth: int, over: tuple[int, int]) -> None:
    """STEP rows from `start` on, of which `first` up to `last` are the expert's. All are rows of the block."""
    start = pl.multiple_of(jnp.minimum(start, rows.shape[0] - STEP), ROW_TILE)
    some = pl.ds(start, STEP)
    own_weights = w[:, :depth] if over[1] == 1 else w[:depth]
    product = dot(rows[some], own_weights, over)[:, : out.shape[1]].astype(out.dtype)
    row = start + jax.lax.broadcasted_iota(jnp.int32, product.shape, 0)
    out[some] = jnp.where((row >= first) & (row < last), product, out[some])


def _weight_gradient(
    corner: Corner, chip: Chip, last: bool, rows_RxF: jax.Array, rows_RxD: jax.Array, total: jax.Array, grid: Grid
) -> jax.Array:
    """`total` and in its corner, of every expert, the sum over its rows: [G, E, F, D]. The last user's begins it."""
    blocks, ends = (total.shape[0], corner.experts), (grid.visits.start_E, grid.visits.end_E)
    own = weight_gradient(rows_RxF, rows_RxD, *ends, blocks, corner.place, chip, None if last else total)
    return jnp.pad(own, [(0, more - used) for more, used in zip(total.shape, own.shape, strict=True)])
