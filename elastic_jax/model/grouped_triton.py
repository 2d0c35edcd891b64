"""The experts' matmuls on NVIDIA GPUs by Triton kernels: blocks of rows, each of one expert, whose weights are read in place.

XLA has no grouped matmul for these GPUs: of `ragged_dot` it makes one matmul with all experts' weights, in which every row has
zeros for all experts but its own. Here rows are sorted by expert and padded to whole blocks (`grouped.block_plan`), a program
multiplies one block by some columns of its expert's weights, and another sums some of an expert's gradient over its blocks. As on
TPU (`grouped_kernel.py`) a budget's weights are the leading corner of the parent's, and are not cut out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from elastic_jax.model.grouped_kernel import Corner
from elastic_jax.model.tiles import dot
from elastic_jax.model.triton import plgpu

ROWS = 64  # of a block: what one matmul instruction of a group of four warps takes
COLUMNS, DEPTH = 128, 64  # of a program's product, and what it multiplies at a time
TILE = 64, 128  # of an expert's gradient


class Blocks(NamedTuple):
    """Blocks of rows in the order of their experts: each block's expert; expert e has those from edges[e] up to edges[e + 1]."""

    expert_N: jax.Array
    edges: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def block_matmul(corner: Corner, into: bool, interpret: bool, rows: jax.Array, w_GxExFxD: jax.Array, blocks: Blocks) -> jax.Array:
    """rows [R, d] by their experts' transposed weights, [R, f]; or, out of the experts, rows [R, f] by them, [R, d].

    Rows of padding must be zero, of which the gradient of what is made of them must be zero too; they give zeros.
    """
    return _product(corner, into, interpret, rows, w_GxExFxD, blocks)


def _forward(corner, into, interpret, rows, w, blocks):
    return _product(corner, into, interpret, rows, w, blocks), (rows, w, blocks)


def _backward(corner, into, interpret, saved, grad):
    rows, w, blocks = saved
    rows_f, rows_d = (grad, rows) if into else (rows, grad)
    d_w = _weight_gradient(corner, interpret, rows_f, rows_d, w, blocks)
    return _product(corner, not into, interpret, grad, w, blocks), d_w, None


block_matmul.defvjp(_forward, _backward)


def _within(*dims: tuple[jax.Array, int, int]) -> jax.Array | None:
    """Which of a tile are numbers of the array: (start, size of the tile, size of the array) of both dimensions."""
    if all(size % tile == 0 for _, tile, size in dims):
        return None
    shape = tuple(tile for _, tile, _ in dims)
    inside = [start + jax.lax.broadcasted_iota(jnp.int32, shape, n) < size for n, (start, _, size) in enumerate(dims)]
    return inside[0] & inside[1]


def _tile(ref: Any, *dims: tuple[jax.Array, int, int], of: tuple[jax.Array, ...] = ()) -> jax.Array:
    """A tile of the last two dimensions, zero beyond the array; `of` says where in those before."""
    mask = _within(*dims)
    part = ref.at[(*of, *(pl.ds(start, tile) for start, tile, _ in dims))]
    return plgpu.load(part, mask=mask, other=None if mask is None else 0.0)


def _put(ref: Any, value: jax.Array, *dims: tuple[jax.Array, int, int]) -> None:
    part = ref.at[tuple(pl.ds(start, tile) for start, tile, _ in dims)]
    plgpu.store(part, value.astype(ref.dtype), mask=_within(*dims))


def _product(corner: Corner, into: bool, interpret: bool, rows_RxC: jax.Array, w: jax.Array, blocks: Blocks) -> jax.Array:
    count, depth = blocks.expert_N.shape[0], rows_RxC.shape[1]
    columns = corner.width if into else corner.embed
    # Programs with the same block, and then those with the same expert, run side by side, and find its numbers in the cache.
    return pl.pallas_call(
        partial(_product_kernel, corner=corner, into=into, columns=columns),
        grid=(pl.cdiv(columns, COLUMNS), count),
        in_specs=[
            pl.BlockSpec((ROWS, depth), lambda n, i: (i, 0)),
            pl.BlockSpec(w.shape, lambda n, i: (0, 0, 0, 0)),
            pl.BlockSpec((1,), lambda n, i: (i,)),
            pl.BlockSpec(blocks.edges.shape, lambda n, i: (0,)),
        ],
        out_specs=pl.BlockSpec((ROWS, columns), lambda n, i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows_RxC.shape[0], columns), rows_RxC.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name='experts_into' if into else 'experts_out',
    )(rows_RxC, w, *blocks)


def _product_kernel(rows, w, expert, edges, out, *, corner: Corner, into: bool, columns: int) -> None:
    n, i, depth = pl.program_id(0), pl.program_id(1), rows.shape[1]
    own = partial(_tile, w, of=corner.place(expert[0]))
    column = n * COLUMNS, COLUMNS, columns

    def step(k: jax.Array, total: jax.Array) -> jax.Array:
        part = k * DEPTH, DEPTH, depth
        some = _tile(rows, (0, ROWS, ROWS), part)
        return total + (dot(some, own(column, part), (1, 1)) if into else dot(some, own(part, column), (1, 0)))

    # Blocks that no expert has hold padding alone.
    steps = pl.cdiv(depth, DEPTH) * (i < edges[edges.shape[0] - 1]).astype(jnp.int32)
    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((ROWS, COLUMNS), jnp.float32))
    _put(out, total, (0, ROWS, ROWS), column)


def _weight_gradient(
    corner: Corner, interpret: bool, rows_RxF: jax.Array, rows_RxD: jax.Array, w_GxExFxD: jax.Array, blocks: Blocks
) -> jax.Array:
    """Of every expert the sum over its rows, [G, E, F, D]: zero but in the corner."""
    groups, width, embed = w_GxExFxD.shape[0], corner.width, corner.embed
    whole = lambda u: pl.BlockSpec(u.shape, lambda d, f, e: (0,) * u.ndim)
    gradient = pl.pallas_call(
        partial(_weight_gradient_kernel, width=width, embed=embed),
        grid=(pl.cdiv(embed, TILE[1]), pl.cdiv(width, TILE[0]), groups * corner.experts),
        in_specs=[whole(rows_RxF), whole(rows_RxD), whole(blocks.edges)],
        out_specs=pl.BlockSpec((None, None, width, embed), lambda d, f, e: (*corner.place(e), 0, 0)),
        out_shape=jax.ShapeDtypeStruct((groups, corner.experts, width, embed), w_GxExFxD.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name='experts_gradient',
    )(rows_RxF, rows_RxD, blocks.edges)
    return jnp.pad(gradient, [(0, more - own) for more, own in zip(w_GxExFxD.shape, gradient.shape, strict=True)])


def _weight_gradient_kernel(rows_f, rows_d, edges, out, *, width: int, embed: int) -> None:
    d, f, e = (pl.program_id(n) for n in range(3))
    of_f, of_d = (f * TILE[0], TILE[0], width), (d * TILE[1], TILE[1], embed)

    def block(i: jax.Array, total: jax.Array) -> jax.Array:
        rows = i * ROWS, ROWS, rows_f.shape[0]
        return total + dot(_tile(rows_f, rows, of_f), _tile(rows_d, rows, of_d), (0, 0))

    _put(out, jax.lax.fori_loop(edges[e], edges[e + 1], block, jnp.zeros(TILE, jnp.float32)), of_f, of_d)
