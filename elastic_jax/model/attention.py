"""Causal grouped-query attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elastic_jax.arch import Attention, Rope
from elastic_jax.model.collectives import enter, leave
from elastic_jax.model.context import HARD, Context, Mixed, Soft
from elastic_jax.model.flash import fits_flash, flash_attention
from elastic_jax.model.flash_triton import fits_flash_triton, flash_attention_by_triton
from elastic_jax.model.kernels import by_kernel, by_platform
from elastic_jax.model.linear import linear, out_of
from elastic_jax.model.norm import rms_norm
from elastic_jax.model.shapes import lead

# Of sequences longer than LONGEST, ROWS queries at a time meet all keys.
LONGEST, ROWS = 2048, 512


class KVCache(NamedTuple):
    """Keys [B, K, H, S] and values [B, K, S, H] of one block; slot s holds token s of its row.

    Both stand as a decoding step's matmuls want them, what is summed over first: else every step would transpose them.
    """

    k_BxKxHxS: jax.Array
    v_BxKxSxH: jax.Array


def init_kv_cache(mixer: Attention, batch: int, slots: int, dtype: jnp.dtype) -> KVCache:
    heads = (batch, mixer.kv_heads)
    keys, values = (*heads, mixer.head_dim, slots), (*heads, slots, mixer.head_dim)
    return KVCache(jnp.zeros(keys, dtype), jnp.zeros(values, dtype))


def attention(
    params: dict[str, jax.Array],
    x_BxTxD: jax.Array,
    mixer: Attention,
    context: Context,
    cache: KVCache | None,
    soft: Soft = HARD,
) -> Mixed:
    """The attention mixer. KV heads are stored (G, K/G) and merged here; Q is the number of query heads per KV head."""
    del soft
    axes = context.shards.of('kv_heads_blocks')
    x_BxTxD = enter(x_BxTxD, axes)
    q_BxTxKxQxH = _project(x_BxTxD, params['q'], params.get('q_bias'))
    k_BxTxKxH = _project(x_BxTxD, params['k'], params.get('k_bias'))
    v_BxTxKxH = _project(x_BxTxD, params['v'], params.get('v_bias'))
    if mixer.qk_norm:
        q_BxTxKxQxH = rms_norm(q_BxTxKxQxH, enter(params['q_norm'], axes), context.norm_eps)
        k_BxTxKxH = rms_norm(k_BxTxKxH, enter(params['k_norm'], axes), context.norm_eps)
    if mixer.rope is not None:
        cos_BxTxH, sin_BxTxH = rotary_angles(context.positions_BxT, mixer.head_dim, mixer.rope)
        q_BxTxKxQxH = rotate(q_BxTxKxQxH, cos_BxTxH[:, :, None, None], sin_BxTxH[:, :, None, None])
        k_BxTxKxH = rotate(k_BxTxKxH, cos_BxTxH[:, :, None], sin_BxTxH[:, :, None])
    if cache is None:
        inputs = q_BxTxKxQxH, k_BxTxKxH, v_BxTxKxH, context.segment_ids_BxT
        length = x_BxTxD.shape[1]
        kernel = flash_attention if fits_flash(length) else None
        cuda = flash_attention_by_triton if fits_flash_triton(length, mixer.head_dim) else None
        heads_BxTxKxQxH = by_kernel(context.target, kernel, attend_causally, *inputs, cuda=cuda)
    else:
        cache = KVCache(
            _write(cache.k_BxKxHxS, jnp.moveaxis(k_BxTxKxH, 1, 3), context.length_B, 1),
            _write(cache.v_BxKxSxH, jnp.moveaxis(v_BxTxKxH, 1, 2), context.length_B, 0),
        )
        keys, values = cache.k_BxKxHxS.astype(x_BxTxD.dtype), cache.v_BxKxSxH.astype(x_BxTxD.dtype)
        last_BxT = context.length_B[:, None] + jnp.arange(x_BxTxD.shape[1])[None]
        inputs = q_BxTxKxQxH, keys, values, last_BxT
        on_cpu, on_tpu = partial(_attend_filled, rows=64, narrowest=64), partial(_attend_filled, rows=256, narrowest=128)
        heads_BxTxKxQxH = by_platform(context.target, *inputs, default=_attend_cached, cpu=on_cpu, tpu=on_tpu)
    y_BxTxD = leave(out_of(heads_BxTxKxQxH.reshape(*x_BxTxD.shape[:2], -1), params['o'], context.target), axes)
    if mixer.output_bias:
        y_BxTxD = y_BxTxD + lead(params['o_bias'], y_BxTxD).astype(y_BxTxD.dtype)
    return Mixed(y_BxTxD, cache, {'heads': heads_BxTxKxQxH} if context.taps else {})


def _project(x_BxTxD: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    """x @ kernel [D, G, K/G, ...], with the two dimensions of the KV heads merged."""
    kernel = kernel.reshape(kernel.shape[0], -1, *kernel.shape[3:])
    y = linear(x_BxTxD, kernel)
    return y if bias is None else y + lead(bias.reshape(kernel.shape[1:]), y).astype(y.dtype)


def attend_causally(
    q_BxTxKxQxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    segment_ids_BxT: jax.Array | None,
    longest: int = LONGEST,
    rows: int = ROWS,
) -> jax.Array:
    """What each query sees of its own document, up to itself: [B, T, K, Q, H].

    A sequence of more than `longest` tokens is taken `rows` queries at a time, whose weights are computed again in the backward
    pass: memory then grows with T and not with T².
    """
    length = q_BxTxKxQxH.shape[1]
    if length <= longest:
        allowed_BxTxS = _allowed(jnp.arange(length), length, segment_ids_BxT, segment_ids_BxT)
        return _attend(q_BxTxKxQxH, k_BxTxKxH, v_BxTxKxH, allowed_BxTxS)

    def split(x: jax.Array, axis: int) -> jax.Array:
        padded = jnp.pad(x, [(0, -length % rows if axis == dim else 0) for dim in range(x.ndim)], mode='edge')
        parts = padded.reshape(*x.shape[:axis], -1, rows, *x.shape[axis + 1 :])
        return jnp.moveaxis(parts, axis, 0)

    @jax.checkpoint
    def some(part: tuple[jax.Array, jax.Array, jax.Array | None]) -> jax.Array:
        q_BxRxKxQxH, steps_R, ids_BxR = part
        return _attend(q_BxRxKxQxH, k_BxTxKxH, v_BxTxKxH, _allowed(steps_R, length, ids_BxR, segment_ids_BxT))

    ids_NxBxR = None if segment_ids_BxT is None else split(segment_ids_BxT, 1)
    heads_NxBxRxKxQxH = jax.lax.map(some, (split(q_BxTxKxQxH, 1), split(jnp.arange(length), 0), ids_NxBxR))
    joined = jnp.moveaxis(heads_NxBxRxKxQxH, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _allowed(steps_R: jax.Array, length: int, ids_BxR: jax.Array | None, ids_BxT: jax.Array | None) -> jax.Array:
    """Which of all T tokens the queries at `steps_R` may see: [B or 1, R, T]."""
    allowed_1xRxT = (steps_R[:, None] >= jnp.arange(length)[None, :])[None]
    if ids_BxT is None:
        return allowed_1xRxT
    return allowed_1xRxT & (ids_BxR[:, :, None] == ids_BxT[:, None, :])


def _attend(q_BxTxKxQxH: jax.Array, k_BxSxKxH: jax.Array, v_BxSxKxH: jax.Array, allowed_BxTxS: jax.Array) -> jax.Array:
    scale = 1.0 / math.sqrt(q_BxTxKxQxH.shape[-1])
    scores_BxKxQxTxS = jnp.einsum('btkqh,bskh->bkqts', q_BxTxKxQxH * scale, k_BxSxKxH, preferred_element_type=jnp.float32)
    weights_BxKxQxTxS = _weights(scores_BxKxQxTxS, allowed_BxTxS[:, None, None]).astype(v_BxSxKxH.dtype)
    return jnp.einsum('bkqts,bskh->btkqh', weights_BxKxQxTxS, v_BxSxKxH)


def _attend_filled(
    q_BxTxKxQxH: jax.Array, k_BxKxHxS: jax.Array, v_BxKxSxH: jax.Array, last_BxT: jax.Array, rows: int, narrowest: int
) -> jax.Array:
    """`_attend_cached` that leaves out the slots after the last that any row may see, `rows` queries at a time.

    Few widths are compiled, from `narrowest` doubling, and the first that is wide enough is chosen by the rows' lengths: a cache
    costs what it holds and not what it could hold, and a prompt's first queries do not meet its last keys. On TPU `narrowest`
    is a lane's 128, as a narrower part would be cut out of a copy of the whole cache.
    """
    slots, length = v_BxKxSxH.shape[2], q_BxTxKxQxH.shape[1]
    widths = [narrowest << n for n in range(slots.bit_length()) if narrowest << n < slots] + [slots]

    def within(width: int) -> Callable[..., jax.Array]:
        return lambda q, last: _attend_cached(q, k_BxKxHxS[..., :width], v_BxKxSxH[:, :, :width], last)

    def some(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        needed = jnp.sum(jnp.asarray(widths) < jnp.max(part[1]) + 1)
        return jax.lax.switch(needed, [within(width) for width in widths], *part)

    if length <= rows or length % rows:
        return some((q_BxTxKxQxH, last_BxT))
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, rows, *x.shape[2:]), 1, 0)
    heads_NxBxRxKxQxH = jax.lax.map(some, (split(q_BxTxKxQxH), split(last_BxT)))
    return jnp.moveaxis(heads_NxBxRxKxQxH, 0, 1).reshape(q_BxTxKxQxH.shape)


def _attend_cached(q_BxTxKxQxH: jax.Array, k_BxKxHxS: jax.Array, v_BxKxSxH: jax.Array, last_BxT: jax.Array) -> jax.Array:
    """`_attend` where the keys and values are a cache's: the queries of a KV head are rows of one matmul.

    last_BxT: the last slot that each query may see.
    """
    allowed_BxTxS = jnp.arange(v_BxKxSxH.shape[2])[None, None] <= last_BxT[..., None]
    batch, length, heads, group, dim = q_BxTxKxQxH.shape
    q_BxKxNxH = jnp.moveaxis(q_BxTxKxQxH, 1, 2).reshape(batch, heads, length * group, dim) / math.sqrt(dim)
    scores_BxKxNxS = jnp.einsum('bknh,bkhs->bkns', q_BxKxNxH, k_BxKxHxS, preferred_element_type=jnp.float32)
    allowed_Bx1xNxS = jnp.repeat(allowed_BxTxS, group, axis=1)[:, None]
    weights_BxKxNxS = _weights(scores_BxKxNxS, allowed_Bx1xNxS).astype(v_BxKxSxH.dtype)
    heads_BxKxNxH = jnp.einsum('bkns,bksh->bknh', weights_BxKxNxS, v_BxKxSxH)
    return jnp.moveaxis(heads_BxKxNxH.reshape(batch, heads, length, group, dim), 2, 1)


def _weights(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    # A finite floor: a padding token that may see nothing gets an average, never NaN.
    return jax.nn.softmax(jnp.where(allowed, scores, -1e30), axis=-1)


def _write(cache_BxKxYxZ: jax.Array, new_BxKxYxZ: jax.Array, start_B: jax.Array, axis: int) -> jax.Array:
    """Writes each row's new entries at its own position along `axis` of a head.

    By rows on a TPU, where it stays in place. On CPU by rows and heads: it is then a scatter even for a single row, whose one
    update XLA would make part of two fusions, and pay with four copies of the cache in every step.
    """
    update = lambda head, new, start: jax.lax.dynamic_update_slice_in_dim(head, new, start, axis)

    def by_row(cache: jax.Array, new: jax.Array, start_B: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(update, (0, 0, None)))(cache, new, start_B)

    def by_head(cache: jax.Array, new: jax.Array, start_B: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(update))(cache, new, jnp.broadcast_to(start_B[:, None], cache.shape[:2]))

    new_BxKxYxZ = new_BxKxYxZ.astype(cache_BxKxYxZ.dtype)
    return jax.lax.platform_dependent(cache_BxKxYxZ, new_BxKxYxZ, start_B, cpu=by_head, default=by_row)


def rotary_angles(positions_BxT: jax.Array, head_dim: int, rope: Rope) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, H/2] of the rotary angles, in float32 (RoFormer, arXiv 2104.09864; scaling as Llama 3.1 does)."""
    inverse = rope.theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.scaling:
        factor, low, high, original = rope.scaling
        wavelength = 2 * math.pi / inverse
        smooth = jnp.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        inverse = (1 - smooth) * inverse / factor + smooth * inverse
    angles = positions_BxT[..., None].astype(jnp.float32) * inverse[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i+H/2}) by their angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
