"""The experts' matmuls on TPU: rows sorted by expert, each by its own expert's weights, read in place.

An expert's weights lie as [F, D] in the parent's array [G, E, F, D], into the expert and out of it. A budget's are the leading
corner [G, e, f, d] of that, and the kernels read only those tiles of it: cutting the corner out would copy, in every pass and for
every budget, as many bytes as the matmuls read. The grid visits every block of rows once for each expert that has rows in it (as
MegaBlocks does, arXiv 2211.15841), with one expert's weights on the chip until the next one's turn.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from elastic_jax.model.grouped_gradient import weight_gradient
from elastic_jax.model.tiles import LANES, MEMORY, ROW_TILE, Chip, dot, even_tile, whole

ROWS = 128  # of a block, half as many where experts have few: a block that several share is computed for each of them
FEW = 1024  # rows an expert
WEIGHTS = 6 * 2**20  # bytes of weights on the chip at a time, half of what it then holds of them


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
    """Block `block_V[v]` of rows meets expert `expert_V[v]`, whose rows are `start_E` up to `end_E`.

    Blocks and experts never go back. An expert without rows has one visit, which changes nothing.
    """

    expert_V: jax.Array
    block_V: jax.Array
    start_E: jax.Array
    end_E: jax.Array


class Grid(NamedTuple):
    """The first `count` visits are made."""

    count: jax.Array
    visits: Visits


def block_of(rows: int, experts: int) -> int:
    """Rows of a block."""
    return ROWS // 2 if rows < FEW * experts else ROWS


def grid_of(sizes_E: jax.Array, rows: int) -> Grid:
    """Of `rows` rows, a multiple of ROWS, sorted by expert, of which each has `sizes_E`; any left over belong to nobody."""
    block = block_of(rows, len(sizes_E))
    end_E = jnp.cumsum(sizes_E)
    start_E = end_E - sizes_E
    first_E = jnp.minimum(start_E // block, rows // block - 1)
    steps_E = jnp.where(sizes_E > 0, (end_E - 1) // block - first_E + 1, 1)
    last_E = jnp.cumsum(steps_E)
    step_V = jnp.arange(rows // block + sizes_E.shape[0])
    expert_V = jnp.minimum(jnp.searchsorted(last_E, step_V, side='right', method='compare_all'), sizes_E.shape[0] - 1)
    block_V = first_E[expert_V] + step_V - (last_E - steps_E)[expert_V]
    return Grid(last_E[-1], Visits(*(u.astype(jnp.int32) for u in (expert_V, block_V, start_E, end_E))))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def into_experts(
    corner: Corner, chip: Chip, last: bool, rows_RxD: jax.Array, w_GxExFxD: jax.Array, total: jax.Array, grid: Grid
) -> tuple[jax.Array, jax.Array]:
    """(rows [R, d] by their experts' transposed weights: [R, f], total). Rows that belong to nobody are undefined, in gradients
    too. `total`, which has the weights' gradient, and `last` are a Summed's.
    """
    return _product(corner, chip, rows_RxD, w_GxExFxD, grid, into=True), total


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def out_of_experts(
    corner: Corner, chip: Chip, last: bool, rows_RxF: jax.Array, w_GxExFxD: jax.Array, total: jax.Array, grid: Grid
) -> tuple[jax.Array, jax.Array]:
    """(rows [R, f] by their experts' weights: [R, d], total); as `into_experts` otherwise."""
    return _product(corner, chip, rows_RxF, w_GxExFxD, grid, into=False), total


def _into_forward(corner, chip, last, rows, w, total, grid):
    return into_experts(corner, chip, last, rows, w, total, grid), (rows, w, grid)


def _into_backward(corner, chip, last, saved, grads):
    (rows_RxD, w, grid), (grad_RxF, total) = saved, grads
    d_rows = _product(corner, chip, grad_RxF, w, grid, into=False)
    return d_rows, None, _weight_gradient(corner, chip, last, grad_RxF, rows_RxD, total, grid), None


def _out_forward(corner, chip, last, rows, w, total, grid):
    return out_of_experts(corner, chip, last, rows, w, total, grid), (rows, w, grid)


def _out_backward(corner, chip, last, saved, grads):
    (rows_RxF, w, grid), (grad_RxD, total) = saved, grads
    d_rows = _product(corner, chip, grad_RxD, w, grid, into=True)
    return d_rows, None, _weight_gradient(corner, chip, last, rows_RxF, grad_RxD, total, grid), None


into_experts.defvjp(_into_forward, _into_backward)
out_of_experts.defvjp(_out_forward, _out_backward)


def _product(corner: Corner, chip: Chip, rows_RxC: jax.Array, w_GxExFxD: jax.Array, grid: Grid, into: bool) -> jax.Array:
    rows, depth = rows_RxC.shape
    stored_width, stored_embed = w_GxExFxD.shape[2:]
    block = block_of(rows, w_GxExFxD.shape[0] * corner.experts)
    columns = corner.width if into else corner.embed
    other = whole(depth, stored_embed, LANES) if into else whole(depth, stored_width, ROW_TILE)
    tile = even_tile(columns, stored_width if into else stored_embed, other * w_GxExFxD.dtype.itemsize, WEIGHTS)
    if into:
        shape, place, over = (tile, other), lambda n: (n, 0), (1, 1)
    else:
        shape, place, over = (other, tile), lambda n: (0, n), (1, 0)
    expert = lambda n, v, visits: (*corner.place(visits.expert_V[v]), *place(n))
    call = pl.pallas_call(
        partial(_product_kernel, depth=depth, over=over),
        out_shape=jax.ShapeDtypeStruct((rows, columns), rows_RxC.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-columns // tile), grid.count),
            in_specs=[
                pl.BlockSpec((block, depth), lambda n, v, visits: (visits.block_V[v], 0)),
                pl.BlockSpec((None, None, *shape), expert),
            ],
            out_specs=pl.BlockSpec((block, min(tile, columns)), lambda n, v, visits: (visits.block_V[v], n)),
        ),
        compiler_params=_ORDER,
        interpret=chip.interpret,
        name='experts_into' if into else 'experts_out',
    )
    return call(grid.visits, rows_RxC, w_GxExFxD)


def _product_kernel(visits: Visits, rows, w, out, *, depth: int, over: tuple[int, int]) -> None:
    own_weights = w[:, :depth] if over[1] == 1 else w[:depth]
    product = dot(rows[...], own_weights, over)[:, : out.shape[1]].astype(out.dtype)
    out[...] = jnp.where(_own(visits, product.shape), product, out[...])


def _weight_gradient(
    corner: Corner, chip: Chip, last: bool, rows_RxF: jax.Array, rows_RxD: jax.Array, total: jax.Array, grid: Grid
) -> jax.Array:
    """`total` and in its corner, of every expert, the sum over its rows: [G, E, F, D]. The last user's begins it."""
    blocks, ends = (total.shape[0], corner.experts), (grid.visits.start_E, grid.visits.end_E)
    own = weight_gradient(rows_RxF, rows_RxD, *ends, blocks, corner.place, chip, None if last else total)
    return jnp.pad(own, [(0, more - used) for more, used in zip(total.shape, own.shape, strict=True)])


# Columns may be shared between a chip's cores; visits follow each other.
_ORDER = pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=MEMORY)


def _own(visits: Visits, shape: tuple[int, ...]) -> jax.Array:
    """Which rows of this step's block are its expert's."""
    v = pl.program_id(1)
    expert = visits.expert_V[v]
    row = visits.block_V[v] * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= visits.start_E[expert]) & (row < visits.end_E[expert])
