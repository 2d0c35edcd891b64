"""Grouped matmul: every token through the experts it chose, dropless, with static shapes.

Forms with the same numbers. On TPU assignments are sorted by expert, for a kernel (`grouped_kernel.py`) or for `ragged_dot`. On
CPU and NVIDIA GPUs, where that computes every expert, each expert's rows are padded to whole blocks, and one batched matmul runs
over the blocks, or on such a GPU a kernel (`grouped_triton.py`). Where nothing asks for a gradient, on CPU a loop runs over just
the blocks that hold rows, and decoding reads an expert's weights once for a token or two, not for sixty-four rows of padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elastic_jax.model import grouped_triton
from elastic_jax.model.fetch import Summed, Way, fetch_summed
from elastic_jax.model.grouped_kernel import ROWS, Corner, block_of, grid_of, into_experts, out_of_experts
from elastic_jax.model.kernels import ANYWHERE, Target, by_kernel, by_platform
from elastic_jax.model.tiles import Chip
from elastic_jax.model.triton import plgpu

BLOCK = 64  # rows that every expert's are padded to
LARGEST = 128  # rows of a block where experts run in turn

# (rows, w) -> (their product, w for the next user).
Matmul = Callable[[jax.Array, Summed], tuple[jax.Array, Summed]]


class Matmuls(NamedTuple):
    """Each row by its own expert's weights, which are the corner that is used of the stored w [G, E, F, D].

    Attributes:
      into: of rows [R, d], [R, f].
      out_of: of rows [R, f], [R, d].
      of_pairs: of a number for each (token, choice) pair, [K, N], the rows' numbers [R].
    """

    into: Matmul
    out_of: Matmul
    of_pairs: Callable[[jax.Array], jax.Array]


class Fill(NamedTuple):
    """What must be zeros, at the cost of a pass over all rows: rows of padding; pairs whose expert is elsewhere."""

    rows: bool = True
    pairs: bool = True


Weights = dict[str, Summed]
Outputs = tuple[tuple[jax.Array, ...], Weights]  # and the weights for their next user
OwnNetwork = Callable[[jax.Array, Matmuls], Outputs]  # with its weights
# (rows, the corner cut out of a w, groups of a Plan) -> rows; into: whether the corner is transposed.
Grouped = Callable[[jax.Array, jax.Array, jax.Array, bool], jax.Array]


class Plan(NamedTuple):
    """Where each (token, choice) pair lives among the rows that the experts compute.

    Attributes:
      row_of_pair: [K·N] row of each pair; R for a pair whose expert is not here.
      pair_of_row: [R] pair of each row; K·N for a row of padding.
      groups: [R / BLOCK] expert of each block, or [E] rows of each expert.
    """

    row_of_pair: jax.Array
    pair_of_row: jax.Array
    groups: jax.Array


def apply_experts(
    x_NxD: jax.Array,
    ids_KxN: jax.Array,
    experts: int,
    corner: Corner,
    network: Callable[[jax.Array, Matmuls, Weights], Outputs],
    weights: Weights,
    differentiable: bool = True,
    target: Target = ANYWHERE,
    complete: bool = False,
) -> Outputs:
    """`network` of each token's K experts, added up: [N, ...]; what else it returns, of each pair, [K, N, ...], as a dimension of
    K beside the last one would fill half a tile; and the weights for their next user.

    Args:
      ids_KxN: 0 … experts - 1, or `experts` for an expert that is not here: its output is zero.
      corner: of the stored weights.
      network: maps (rows [R, D], matmuls, weights) to arrays [R, ...], the output first, and the weights as it leaves them.
      weights: by name, each [G, E, F, D].
      differentiable: whether a gradient may be asked for, which the loop on CPU does not have.
      target: a Context's. complete: whether every pair's expert is here.
    """
    fill, own = Fill(pairs=not complete), lambda rows, matmuls: network(rows, matmuls, weights)
    blocks = lambda block: lambda x, ids: _run(x, ids, block_plan(ids, experts, block), corner, _block_matmul, own, fill)
    by_ragged = lambda x, ids: _run(x, ids, sorted_plan(ids, experts), corner, _ragged_matmul, own, fill)
    in_turn = lambda x, ids: (_run_in_turn(x, ids, experts, corner, own), weights)
    on_cpu = blocks(BLOCK) if differentiable else in_turn
    # A block's weights are gathered from its expert: of larger blocks a GPU keeps fewer copies, about three of all weights.
    on_cuda = blocks(max(BLOCK, block_size(ids_KxN.size, experts, largest=ids_KxN.size)))
    plain = lambda x, ids: by_platform(target, x, ids, default=by_ragged, cpu=on_cpu, cuda=on_cuda)
    given = {'experts': experts, 'corner': corner, 'network': own}
    # The kernel for TPU leaves rows that are nobody's out itself.
    kernel = partial(_run_by_kernel, **given, fill=fill._replace(rows=False), memory=target.memory)
    cuda = None if plgpu is None else partial(_run_by_triton, **given, fill=fill)
    return by_kernel(target, kernel, plain, x_NxD, ids_KxN, cuda=cuda)


def _run_by_kernel(
    x_NxD: jax.Array,
    ids_KxN: jax.Array,
    experts: int,
    corner: Corner,
    network: OwnNetwork,
    fill: Fill,
    memory: int,
    interpret: bool,
) -> Outputs:
    plan, chip = sorted_plan(ids_KxN, experts, ROWS), Chip(memory, interpret)
    rows = plan.pair_of_row.shape[0]
    grid = grid_of(plan.groups, rows, block_of(corner, rows, x_NxD.dtype.itemsize, chip))

    def one_way(form: Callable[..., tuple[jax.Array, jax.Array]]) -> Matmul:
        def run(rows: jax.Array, given: Summed) -> tuple[jax.Array, Summed]:
            own = fetch_summed(given.w, Way(), given.w.dtype) if given.total is None else given
            product, total = form(corner, chip, own.last, rows, own.w, own.total, grid)
            return product, given if given.total is None else dataclasses.replace(own, total=total)

        return run

    matmuls = Matmuls(one_way(into_experts), one_way(out_of_experts), partial(_of_pairs, fill, plan))
    outputs, weights = network(_dispatch(fill, x_NxD, plan), matmuls)
    return _collected(outputs, plan, ids_KxN, fill), weights


def _run_by_triton(
    x_NxD: jax.Array, ids_KxN: jax.Array, experts: int, corner: Corner, network: OwnNetwork, fill: Fill, interpret: bool
) -> Outputs:
    plan = block_plan(ids_KxN, experts, grouped_triton.ROWS)
    blocks_E = -(-_sizes(ids_KxN.reshape(-1), experts) // grouped_triton.ROWS)
    blocks = grouped_triton.Blocks(*(u.astype(jnp.int32) for u in (plan.groups, jnp.pad(jnp.cumsum(blocks_E), (1, 0)))))
    one_way = lambda into: lambda rows, own: (grouped_triton.block_matmul(corner, into, interpret, rows, own.w, blocks), own)
    matmuls = Matmuls(one_way(True), one_way(False), partial(_of_pairs, fill, plan))
    outputs, weights = network(_dispatch(fill, x_NxD, plan), matmuls)
    return _collected(outputs, plan, ids_KxN, fill), weights


def _run_in_turn(
    x_NxD: jax.Array, ids_KxN: jax.Array, experts: int, corner: Corner, network: OwnNetwork
) -> tuple[jax.Array, ...]:
    """One used expert after another, its rows block after block; XLA cuts its weights out once, before the inner loop.

    Rows are sorted by expert: the last rows of an expert's last block are written over by the next expert's.
    """
    plan = sorted_plan(ids_KxN, experts)
    pairs = ids_KxN.size
    block = block_size(pairs, experts)
    sizes_E = plan.groups
    first_row_E = jnp.cumsum(sizes_E) - sizes_E
    used_first_E = jnp.argsort(sizes_E == 0, stable=True)
    rows_RxD = jnp.pad(_dispatch(Fill(), x_NxD, plan), ((0, block), (0, 0)))
    pair_of_row = jnp.pad(plan.pair_of_row, (0, block), constant_values=pairs)

    def by(expert: jax.Array, start: jax.Array | int) -> Matmuls:
        its = lambda own: jax.lax.dynamic_index_in_dim(corner.of(own.w), expert, keepdims=False)
        own_pairs = jax.lax.dynamic_slice_in_dim(pair_of_row, start, block)
        return Matmuls(
            into=lambda rows, own: (rows @ its(own).T, own),
            out_of=lambda rows, own: (rows @ its(own), own),
            of_pairs=lambda pairs_KxN: _take(pairs_KxN.reshape(-1), own_pairs, fill=True),
        )

    def of_expert(i: jax.Array, outputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        expert = used_first_E[i]

        def of_block(j: jax.Array, outputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            start = first_row_E[expert] + j * block
            found, _ = network(jax.lax.dynamic_slice_in_dim(rows_RxD, start, block), by(expert, start))
            put = lambda output, new: jax.lax.dynamic_update_slice_in_dim(output, new, start, axis=0)
            return jax.tree.map(put, outputs, found)

        return jax.lax.fori_loop(0, -(-sizes_E[expert] // block), of_block, outputs)

    shapes = jax.eval_shape(lambda rows: network(rows, by(used_first_E[0], 0))[0], rows_RxD[:block])
    empty = tuple(jnp.zeros((pairs + block, *shape.shape[1:]), shape.dtype) for shape in shapes)
    outputs = jax.lax.fori_loop(0, jnp.sum(sizes_E > 0), of_expert, empty)
    return _collected([out[:pairs] for out in outputs], plan, ids_KxN, Fill())


def block_size(pairs: int, experts: int, largest: int = LARGEST) -> int:
    """Rows of a block: one where an expert has few, as a vector's matmul packs nothing; else half an expert's even share."""
    size = 1 if pairs <= 2 * experts else 4
    while size < largest and 4 * size * experts <= pairs:
        size *= 2
    return size


def _run(
    x_NxD: jax.Array, ids_KxN: jax.Array, plan: Plan, corner: Corner, matmul: Grouped, network: OwnNetwork, fill: Fill
) -> Outputs:
    one_way = lambda into: lambda rows, own: (matmul(rows, corner.of(own.w), plan.groups, into), own)
    matmuls = Matmuls(one_way(True), one_way(False), partial(_of_pairs, fill, plan))
    outputs, weights = network(_dispatch(fill, x_NxD, plan), matmuls)
    return _collected(outputs, plan, ids_KxN, fill), weights


def _collected(outputs: Sequence[jax.Array], plan: Plan, ids_KxN: jax.Array, fill: Fill) -> tuple[jax.Array, ...]:
    output, *others = outputs
    of_pair = (_collect(fill, rows, plan).reshape(*ids_KxN.shape, *rows.shape[1:]) for rows in others)
    return (_combine(fill, ids_KxN.shape[1], output, plan), *of_pair)


def sorted_plan(ids_KxN: jax.Array, experts: int, multiple: int = 1) -> Plan:
    """Pairs sorted by expert, without padding but at the end, to a multiple of rows."""
    ids = ids_KxN.reshape(-1)
    pairs, sizes = ids.shape[0], _sizes(ids, experts)
    ordered = jnp.argsort(ids, stable=True)
    pair_of_row = jnp.where(jnp.arange(pairs) < sizes.sum(), ordered, pairs)
    pair_of_row = jnp.pad(pair_of_row, (0, -pairs % multiple), constant_values=pairs)
    return Plan(jnp.where(ids < experts, jnp.argsort(ordered), pair_of_row.shape[0]), pair_of_row, sizes)


def _sizes(ids: jax.Array, experts: int) -> jax.Array:
    return jnp.bincount(ids, length=experts + 1)[:experts]


def block_rows(pairs: int, experts: int, block: int = BLOCK) -> int:
    """Rows that a block plan holds, whatever the routing: every expert that is used wastes less than one block."""
    return (-(-pairs // block) + min(experts, pairs) - 1) * block


def block_plan(ids_KxN: jax.Array, experts: int, block: int = BLOCK) -> Plan:
    """Pairs sorted by expert, each expert starting a new block."""
    ids = ids_KxN.reshape(-1)
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


def _block_matmul(rows: jax.Array, w_ExFxD: jax.Array, block_expert: jax.Array, into: bool) -> jax.Array:
    blocks = rows.reshape(block_expert.shape[0], -1, rows.shape[-1])
    return jnp.einsum('nbd,nfd->nbf' if into else 'nbf,nfd->nbd', blocks, w_ExFxD[block_expert]).reshape(rows.shape[0], -1)


def _ragged_matmul(rows: jax.Array, w_ExFxD: jax.Array, sizes_E: jax.Array, into: bool) -> jax.Array:
    return jax.lax.ragged_dot(rows, jnp.swapaxes(w_ExFxD, 1, 2) if into else w_ExFxD, sizes_E)


def _take(x: jax.Array, index: jax.Array, fill: bool) -> jax.Array:
    return jnp.take(x, index, axis=0, mode='fill', fill_value=0) if fill else jnp.take(x, index, axis=0, mode='clip')


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dispatch(fill: Fill, x_NxD: jax.Array, plan: Plan) -> jax.Array:
    """Rows [R, D]: each pair's token; zeros in the padding."""
    pairs, tokens = plan.row_of_pair.shape[0], x_NxD.shape[0]
    token_of_row = jnp.where(plan.pair_of_row < pairs, plan.pair_of_row % tokens, tokens)
    return _take(x_NxD, token_of_row, fill.rows)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _combine(fill: Fill, tokens: int, rows_RxD: jax.Array, plan: Plan) -> jax.Array:
    """[N, D]: of each token the sum of its pairs' rows, which is the transpose of `_dispatch`: each has the other's gradient.

    A gather where autodiff would scatter: each token's K rows are known. Added one by one: XLA's sum takes four times as long.
    """
    parts_KxNxD = _take(rows_RxD, plan.row_of_pair, fill.pairs).reshape(-1, tokens, *rows_RxD.shape[1:])
    return sum(part_NxD.astype(jnp.float32) for part_NxD in parts_KxNxD).astype(rows_RxD.dtype)


_dispatch.defvjp(
    lambda fill, x_NxD, plan: (_dispatch(fill, x_NxD, plan), (plan, x_NxD.shape[0])),
    lambda fill, saved, rows_RxD: (_combine(fill, saved[1], rows_RxD, saved[0]), None),
)
_combine.defvjp(
    lambda fill, tokens, rows_RxD, plan: (_combine(fill, tokens, rows_RxD, plan), plan),
    lambda fill, tokens, plan, sum_NxD: (_dispatch(fill, sum_NxD, plan), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _collect(fill: Fill, rows: jax.Array, plan: Plan) -> jax.Array:
    """[K·N, ...]: each pair's row."""
    return _take(rows, plan.row_of_pair, fill.pairs)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread(fill: Fill, pairs: jax.Array, plan: Plan) -> jax.Array:
    """[R, ...]: each row's pair; the transpose of `_collect`."""
    return _take(pairs, plan.pair_of_row, fill.rows)


_collect.defvjp(
    lambda fill, rows, plan: (_collect(fill, rows, plan), plan),
    lambda fill, plan, pairs: (_spread(fill, pairs, plan), None),
)
_spread.defvjp(
    lambda fill, pairs, plan: (_spread(fill, pairs, plan), plan),
    lambda fill, plan, rows: (_collect(fill, rows, plan), None),
)


def _of_pairs(fill: Fill, plan: Plan, pairs_KxN: jax.Array) -> jax.Array:
    return _spread(fill, pairs_KxN.reshape(-1), plan)
