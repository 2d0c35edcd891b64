"""Causal attention on NVIDIA GPUs by Triton kernels: no array of tokens x tokens, nor work on blocks that share no document.

FlashAttention (arXiv 2205.14135, 2307.08691), forward and backward, in blocks of queries and keys. Every query head reads the
keys of its own KV head as they lie, none repeated, and their gradients are summed over a few query heads on the chip. Ours, as no
library has this for the versions of JAX that we support: cuDNN takes packed documents by a private interface of JAX alone, JAX's
own Pallas attention for GPUs is deprecated, and tokamax takes documents, by its public interface, as a mask of tokens x tokens.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from elastic_jax.model.tiles import BELOW, dot
from elastic_jax.model.triton import plgpu

BLOCK = 64  # queries or keys
HEADS = 4  # query heads, at most, whose keys' gradients one program sums
WIDEST = 128  # of a head that a program's registers hold
# Of fewer tokens the whole square is small, and XLA's own fusions do.
SHORTEST = 512
_LOG2_E = math.log2(math.e)  # a GPU's exponential is that of 2


def fits_flash_triton(length: int, head_dim: int) -> bool:
    """Whether sequences of this length and heads of this width are for `flash_attention_by_triton`."""
    return plgpu is not None and length >= SHORTEST and head_dim <= WIDEST


@partial(jax.jit, static_argnames='interpret')  # traced once for all layers of one shape
def flash_attention_by_triton(
    q_BxTxKxQxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    segment_ids_BxT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """What each query sees of its own document, up to itself: [B, T, K, Q, H], as `attention.attend_causally` has it.

    A length that blocks do not divide is padded at its end, which no token looks at, and a head to a power of two.
    """
    batch, length, head_dim = *q_BxTxKxQxH.shape[:2], q_BxTxKxQxH.shape[-1]
    wide = max(16, pl.next_power_of_2(head_dim))
    ends = lambda u: [(0, 0), (0, -length % BLOCK)] + [(0, 0)] * (u.ndim - 3) + [(0, wide - head_dim)]
    ids_BxT = jnp.zeros((batch, length), jnp.int32) if segment_ids_BxT is None else segment_ids_BxT
    ids_BxT = jnp.pad(ids_BxT, ((0, 0), (0, -length % BLOCK)), mode='edge')
    q, k, v = (jnp.pad(u, ends(u)) for u in (q_BxTxKxQxH, k_BxTxKxH, v_BxTxKxH))
    return _run(1.0 / math.sqrt(head_dim), interpret, q, k, v, ids_BxT)[:, :length, ..., :head_dim]


def meeting_blocks(ids_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of every block [B, N]: the first that its queries may see, and the last whose queries may see it, by ranges of ids."""
    ids_BxNxR = ids_BxT.reshape(ids_BxT.shape[0], -1, BLOCK)
    low_BxN, high_BxN = ids_BxNxR.min(axis=-1), ids_BxNxR.max(axis=-1)
    count = low_BxN.shape[1]
    order = jnp.arange(count)
    # Row i, column j: queries of block i meet keys of block j.
    meet = (low_BxN[:, :, None] <= high_BxN[:, None, :]) & (low_BxN[:, None, :] <= high_BxN[:, :, None])
    meet = meet & (order[:, None] >= order[None, :])[None]
    first, last = jnp.argmax(meet, axis=2), count - 1 - jnp.argmax(meet[:, ::-1], axis=1)
    return first.astype(jnp.int32), last.astype(jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(scale: float, interpret: bool, *inputs: jax.Array) -> jax.Array:
    return _run_forward(scale, interpret, *inputs)[0]


def _run_forward(scale: float, interpret: bool, *inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q, ids = inputs[0], inputs[3]
    batch, length, kv_heads, per_kv, head_dim = q.shape
    grid, specs = _by_query(q.shape)
    heads, logs = pl.pallas_call(
        partial(_forward_kernel, scale=scale),
        grid=grid,
        in_specs=[specs['query'], specs['keys'], specs['keys'], specs['ids'], specs['first']],
        out_specs=[specs['query'], specs['row']],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, per_kv, length), jnp.float32),
        ],
        compiler_params=_parameters(head_dim),
        interpret=interpret,
        name='flash_forward',
    )(*inputs, meeting_blocks(ids)[0])
    return heads, (*inputs, heads, logs)


def _run_backward(
    scale: float, interpret: bool, saved: tuple[jax.Array, ...], d_heads: jax.Array
) -> tuple[jax.Array | None, ...]:
    q, k, v, ids, heads, logs = saved
    batch, length, kv_heads, per_kv, head_dim = q.shape
    own_BxTxKxQ = jnp.sum(heads.astype(jnp.float32) * d_heads.astype(jnp.float32), axis=-1)
    own = jnp.moveaxis(own_BxTxKxQ, 1, -1)
    first, last = meeting_blocks(ids)
    grid, specs = _by_query(q.shape)
    dq = pl.pallas_call(
        partial(_query_gradient_kernel, scale=scale),
        grid=grid,
        in_specs=[*[specs[name] for name in ('query', 'query', 'keys', 'keys', 'ids', 'row', 'row', 'first')]],
        out_specs=specs['query'],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_parameters(head_dim),
        interpret=interpret,
        name='flash_query_gradients',
    )(q, d_heads, k, v, ids, logs, own, first)

    some = next(m for m in range(min(per_kv, HEADS), 0, -1) if per_kv % m == 0)
    parts = per_kv // some
    place = lambda h: (jax.lax.div(h, parts), jax.lax.rem(h, parts))
    queries = pl.BlockSpec((None, length, None, some, head_dim), lambda n, h, i: (i, 0, *place(h), 0))
    key = pl.BlockSpec((None, BLOCK, None, head_dim), lambda n, h, i: (i, n, place(h)[0], 0))
    rows = pl.BlockSpec((None, None, some, length), lambda n, h, i: (i, *place(h), 0))
    share = pl.BlockSpec((None, BLOCK, None, None, head_dim), lambda n, h, i: (i, n, *place(h), 0))
    shares = jax.ShapeDtypeStruct((batch, length, kv_heads, parts, head_dim), jnp.float32)
    dk, dv = pl.pallas_call(
        partial(_key_gradient_kernel, scale=scale),
        grid=(length // BLOCK, kv_heads * parts, batch),
        in_specs=[queries, queries, key, key, specs['ids'], rows, rows, specs['first']],
        out_specs=[share, share],
        out_shape=[shares, shares],
        compiler_params=_parameters(head_dim),
        interpret=interpret,
        name='flash_key_gradients',
    )(q, d_heads, k, v, ids, logs, own, last)
    return dq, dk.sum(axis=3).astype(k.dtype), dv.sum(axis=3).astype(v.dtype), None


_run.defvjp(_run_forward, _run_backward)


def _by_query(shape: tuple[int, ...]) -> tuple[tuple[int, int, int], dict[str, pl.BlockSpec]]:
    """A program for every block of queries of one head: the grid, and the blocks of its arrays."""
    batch, length, kv_heads, per_kv, head_dim = shape
    head = lambda h: (jax.lax.div(h, per_kv), jax.lax.rem(h, per_kv))
    specs = {
        'query': pl.BlockSpec((None, BLOCK, None, None, head_dim), lambda n, h, i: (i, n, *head(h), 0)),
        'keys': pl.BlockSpec((None, length, None, head_dim), lambda n, h, i: (i, 0, head(h)[0], 0)),
        'ids': pl.BlockSpec((None, length), lambda n, h, i: (i, 0)),
        'row': pl.BlockSpec((None, None, None, BLOCK), lambda n, h, i: (i, *head(h), n)),
        'first': pl.BlockSpec((None, 1), lambda n, h, i: (i, n)),
    }
    return (length // BLOCK, kv_heads * per_kv, batch), specs


def _parameters(head_dim: int) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=4 if head_dim <= 64 else 8, num_stages=2)


def _block(n: jax.Array) -> pl.Slice:
    return pl.ds(n * BLOCK, BLOCK)


def _scores(q: jax.Array, k: jax.Array, ids, i: jax.Array, j: jax.Array, scale: float) -> jax.Array:
    """Logarithms to the base of 2 of the weights of block j's keys for block i's queries, before they are made to sum to 1."""
    row, column = (n * BLOCK + jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), dim) for dim, n in enumerate((i, j)))
    allowed = (row >= column) & (ids[_block(i)][:, None] == ids[_block(j)][None, :])
    return jnp.where(allowed, dot(q, k, (1, 1)) * (scale * _LOG2_E), BELOW)


def _forward_kernel(q, k, v, ids, first, heads, logs, *, scale: float) -> None:
    i, own = pl.program_id(0), q[...]

    def keys(j: jax.Array, before: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, seen = before
        scores = _scores(own, k[_block(j)], ids, i, j, scale)
        new_top = jnp.maximum(top, scores.max(axis=1))
        weights, kept = jnp.exp2(scores - new_top[:, None]), jnp.exp2(top - new_top)
        seen = kept[:, None] * seen + dot(weights.astype(v.dtype), v[_block(j)], (1, 0))
        return new_top, kept * total + weights.sum(axis=1), seen

    start = jnp.full(BLOCK, BELOW, jnp.float32), jnp.zeros(BLOCK, jnp.float32), jnp.zeros(q.shape, jnp.float32)
    top, total, seen = jax.lax.fori_loop(first[0], i + 1, keys, start)
    heads[...] = (seen / total[:, None]).astype(heads.dtype)
    logs[...] = top + jnp.log2(total)


def _score_gradient(q, k, v, d_heads, ids, logs, own, i, j, scale: float) -> tuple[jax.Array, jax.Array]:
    """(weights, gradients of scale · q kᵀ times the scale) of block i's queries and block j's keys."""
    weights = jnp.exp2(_scores(q, k, ids, i, j, scale) - logs[:, None])
    return weights, weights * (dot(d_heads, v, (1, 1)) - own[:, None]) * scale


def _query_gradient_kernel(q, d_heads, k, v, ids, logs, own, first, dq, *, scale: float) -> None:
    i, mine = pl.program_id(0), (q[...], d_heads[...], logs[...], own[...])

    def keys(j: jax.Array, total: jax.Array) -> jax.Array:
        query, d_out, log, dot_own = mine
        key = k[_block(j)]
        d_scores = _score_gradient(query, key, v[_block(j)], d_out, ids, log, dot_own, i, j, scale)[1]
        return total + dot(d_scores.astype(key.dtype), key, (1, 0))

    dq[...] = jax.lax.fori_loop(first[0], i + 1, keys, jnp.zeros(q.shape, jnp.float32)).astype(dq.dtype)


def _key_gradient_kernel(q, d_heads, k, v, ids, logs, own, last, dk, dv, *, scale: float) -> None:
    j, key, value = pl.program_id(0), k[...], v[...]

    def head(h: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def queries(i: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            rows = _block(i)
            query, d_out = q[rows, h], d_heads[rows, h]
            weights, d_scores = _score_gradient(query, key, value, d_out, ids, logs[h, rows], own[h, rows], i, j, scale)
            d_key, d_value = both
            d_value = d_value + dot(weights.astype(d_out.dtype), d_out, (0, 0))
            return d_key + dot(d_scores.astype(query.dtype), query, (0, 0)), d_value

        return jax.lax.fori_loop(j, last[0] + 1, queries, both)

    zeros = jnp.zeros(k.shape, jnp.float32)
    dk[...], dv[...] = jax.lax.fori_loop(0, q.shape[1], head, (zeros, zeros))
