"""Grouped matmul: every token through the experts it chose, dropless, with static shapes.

Three forms with the same numbers. On TPU and GPU assignments are sorted by expert for `ragged_dot`. On CPU, where that computes
every expert, each expert's rows are padded to whole blocks and one batched matmul runs over the blocks; where nothing asks for a
gradient, a loop runs over just the blocks that hold rows, and decoding reads an expert's weights once for a token or two, not for
sixty-four rows of padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 64

Matmul = Callable[[jax.Array, jax.Array], jax.Array]
ExpertNetwork = Callable[[jax.Array, Matmul], tuple[jax.Array, ...]]


class Plan(NamedTuple):
    """Where each (token, choice) pair lives among the rows that the experts compute.

    Attributes:
      row_of_pair: [N·K] row of each pair; R for a pair whose expert is not here.
      pair_of_row: [R] pair of each row; N·K for a row of padding.
      groups: [R / BLOCK] expert of each block, or [E] rows of each expert.
    """

    row_of_pair: jax.Array
    pair_of_row: jax.Array
    groups: jax.Array


def apply_experts(
    x_NxD: jax.Array, ids_NxK: jax.Array, experts: int, network: ExpertNetwork, differentiable: bool = True
) -> tuple[jax.Array, ...]:
    """`network` of each token's K experts: arrays [N, K, ...].

    Args:
      ids_NxK: 0 … experts - 1, or `experts` for an expert that is not here: its output is zero.
      network: maps (rows [R, D], matmul) to arrays [R, ...]; `matmul(rows, w)` multiplies each row by its expert's w [E, D, F].
      differentiable: whether a gradient may be asked for, which the loop of the third form does not have.
    """
    by_blocks = lambda x, ids: _run(x, ids, block_plan(ids, experts), _block_matmul, network)
    by_ragged = lambda x, ids: _run(x, ids, sorted_plan(ids, experts), jax.lax.ragged_dot, network)
    in_turn = lambda x, ids: _run_in_turn(x, ids, experts, network)
    on_cpu = by_blocks if differentiable else in_turn
    return jax.lax.platform_dependent(x_NxD, ids_NxK, cpu=on_cpu, default=by_ragged)


def _run_in_turn(x_NxD: jax.Array, ids_NxK: jax.Array, experts: int, network: ExpertNetwork) -> tuple[jax.Array, ...]:
    """Block after block of rows sorted by expert, as many as there are; the last rows of an expert's last block are written over
    by the next expert's."""
    plan = sorted_plan(ids_NxK, experts)
    pairs = ids_NxK.size
    block = block_size(pairs, experts)
    sizes_E = plan.groups
    last_row_E, last_block_E = jnp.cumsum(sizes_E), jnp.cumsum(-(-sizes_E // block))
    rows_RxD = jnp.pad(_dispatch(x_NxD, plan), ((0, block), (0, 0)))

    def one(rows_BxD: jax.Array, expert: jax.Array) -> tuple[jax.Array, ...]:
        return network(rows_BxD, lambda rows, w_ExDxF: rows @ jax.lax.dynamic_index_in_dim(w_ExDxF, expert, keepdims=False))

    def turn(i: jax.Array, outputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        expert = jnp.sum(last_block_E <= i)
        before = -(-sizes_E[expert] // block) - (last_block_E[expert] - i)
        start = last_row_E[expert] - sizes_E[expert] + before * block
        own = one(jax.lax.dynamic_slice_in_dim(rows_RxD, start, block), expert)
        put = lambda output, new: jax.lax.dynamic_update_slice_in_dim(output, new, start, axis=0)
        return jax.tree.map(put, outputs, own)

    shapes = jax.eval_shape(one, rows_RxD[:block], jnp.int32(0))
    empty = tuple(jnp.zeros((pairs + block, *shape.shape[1:]), shape.dtype) for shape in shapes)
    outputs = jax.lax.fori_loop(0, last_block_E[-1], turn, empty)
    return tuple(_collect(out[:pairs], plan).reshape(*ids_NxK.shape, *out.shape[1:]) for out in outputs)


def block_size(pairs: int, experts: int, largest: int = BLOCK) -> int:
    """Rows of a block: one for a single token, whose matmuls are of a vector; else about half an expert's even share."""
    size = 1 if pairs < 8 else 4
    while size < largest and 4 * size * experts <= pairs:
        size *= 2
    return size


def _run(
    x_NxD: jax.Array, ids_NxK: jax.Array, plan: Plan, matmul: Callable[..., jax.Array], network: ExpertNetwork
) -> tuple[jax.Array, ...]:
    rows_RxD = _dispatch(x_NxD, plan)
    outputs = network(rows_RxD, lambda rows, w: matmul(rows, w, plan.groups))
    return tuple(_collect(out, plan).reshape(*ids_NxK.shape, *out.shape[1:]) for out in outputs)


def sorted_plan(ids_NxK: jax.Array, experts: int) -> Plan:
    """Pairs sorted by expert, without padding."""
    ids = ids_NxK.reshape(-1)
    pairs, sizes = ids.shape[0], _sizes(ids, experts)
    ordered = jnp.argsort(ids, stable=True)
    pair_of_row = jnp.where(jnp.arange(pairs) < sizes.sum(), ordered, pairs)
    return Plan(jnp.where(ids < experts, jnp.argsort(ordered), pairs), pair_of_row, sizes)


def _sizes(ids: jax.Array, experts: int) -> jax.Array:
    return jnp.bincount(ids, length=experts + 1)[:experts]


def block_rows(pairs: int, experts: int, block: int = BLOCK) -> int:
    """Rows that a block plan holds, whatever the routing: every expert that is used wastes less than one block."""
    return (-(-pairs // block) + min(experts, pairs) - 1) * block


def block_plan(ids_NxK: jax.Array, experts: int, block: int = BLOCK) -> Plan:
    """Pairs sorted by expert, each expert starting a new block."""
    ids = ids_NxK.reshape(-1)
    pairs = ids.shape[0]
    ordered, sizes = jnp.argsort(ids, stable=True), _sizes(ids, experts)
    blocks_of = -(-sizes // block)
    last_block = jnp.cumsum(blocks_of)
    first_row, first_pair = (last_block - blocks_of) * block, jnp.cumsum(sizes) - sizes
    blocks = block_rows(pairs, experts, block) // block
    block_expert = jnp.minimum(jnp.searchsorted(last_block, jnp.arange(blocks), side='right'), experts - 1)
    rows = jnp.arange(blocks * block)
    row_expert = jnp.repeat(block_expert, block, total_repeat_length=blocks * block)
    offset = rows - first_row[row_expert]
    filled = (offset < sizes[row_expert]) & (rows < last_block[-1] * block)
    pair_of_row = jnp.where(filled, ordered[jnp.clip(first_pair[row_expert] + offset, 0, pairs - 1)], pairs)
    place, own = jnp.argsort(ordered), jnp.minimum(ids, experts - 1)
    row_of_pair = jnp.where(ids < experts, first_row[own] + place - first_pair[own], blocks * block)
    return Plan(row_of_pair, pair_of_row, block_expert)


def _block_matmul(rows_RxD: jax.Array, w_ExDxF: jax.Array, block_expert: jax.Array) -> jax.Array:
    blocks = rows_RxD.reshape(block_expert.shape[0], -1, rows_RxD.shape[-1])
    return jnp.einsum('nbd,ndf->nbf', blocks, w_ExDxF[block_expert]).reshape(rows_RxD.shape[0], -1)


@jax.custom_vjp
def _dispatch(x_NxD: jax.Array, plan: Plan) -> jax.Array:
    """Rows [R, D]: each pair's token; zeros in the padding."""
    pairs, tokens = plan.row_of_pair.shape[0], x_NxD.shape[0]
    token_of_row = jnp.where(plan.pair_of_row < pairs, plan.pair_of_row // (pairs // tokens), tokens)
    return jnp.take(x_NxD, token_of_row, axis=0, mode='fill', fill_value=0)


def _dispatch_fwd(x_NxD: jax.Array, plan: Plan) -> tuple[jax.Array, tuple[Plan, int]]:
    return _dispatch(x_NxD, plan), (plan, x_NxD.shape[0])


def _dispatch_bwd(residuals: tuple[Plan, int], rows_RxD: jax.Array) -> tuple[jax.Array, None]:
    # A gather where autodiff would scatter: each token's K rows are known.
    plan, tokens = residuals
    return _pairs(rows_RxD, plan).reshape(tokens, -1, rows_RxD.shape[-1]).sum(axis=1), None


_dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def _collect(rows: jax.Array, plan: Plan) -> jax.Array:
    """[N·K, ...]: each pair's row."""
    return _pairs(rows, plan)


def _pairs(rows: jax.Array, plan: Plan) -> jax.Array:
    return jnp.take(rows, plan.row_of_pair, axis=0, mode='fill', fill_value=0)


def _collect_fwd(rows: jax.Array, plan: Plan) -> tuple[jax.Array, Plan]:
    return _collect(rows, plan), plan


def _collect_bwd(plan: Plan, pairs: jax.Array) -> tuple[jax.Array, None]:
    return jnp.take(pairs, plan.pair_of_row, axis=0, mode='fill', fill_value=0), None


_collect.defvjp(_collect_fwd, _collect_bwd)
