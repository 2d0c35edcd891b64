"""Grouped matmul: every token through the experts it chose, dropless, with static shapes.

Two forms with the same numbers: on TPU and GPU assignments are sorted by expert for `ragged_dot`; on CPU, where `ragged_dot`
computes every expert, each expert's rows are padded to whole blocks and one batched matmul runs over the blocks.
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


def apply_experts(x_NxD: jax.Array, ids_NxK: jax.Array, experts: int, network: ExpertNetwork) -> tuple[jax.Array, ...]:
    """`network` of each token's K experts: arrays [N, K, ...].

    Args:
      ids_NxK: 0 … experts - 1, or `experts` for an expert that is not here: its output is zero.
      network: maps (rows [R, D], matmul) to arrays [R, ...]; `matmul(rows, w)` multiplies each row by its expert's w [E, D, F].
    """
    by_blocks = lambda x, ids: _run(x, ids, block_plan(ids, experts), _block_matmul, network)
    by_ragged = lambda x, ids: _run(x, ids, sorted_plan(ids, experts), jax.lax.ragged_dot, network)
    return jax.lax.platform_dependent(x_NxD, ids_NxK, cpu=by_blocks, default=by_ragged)


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
