"""Causal attention on TPU by JAX's splash attention: no array of tokens x tokens, nor any work on blocks above the diagonal.

FlashAttention (arXiv 2205.14135), forward and backward, in blocks of queries and keys.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from elastic_jax.model.tiles import LANES

# At most so many tokens a block, by the TPU compiler's estimates (experiments/bench/chip.py).
BLOCK = 1024
# Of fewer tokens the whole square is small, and XLA's own fusions do.
SHORTEST = 512


def fits_flash(length: int) -> bool:
    """Whether sequences of this length are for `flash_attention`."""
    return length >= SHORTEST


@partial(jax.jit, static_argnames='interpret')  # traced once for all layers of one shape
def flash_attention(
    q_BxTxKxQxH: jax.Array,
    k_BxTxKxH: jax.Array,
    v_BxTxKxH: jax.Array,
    segment_ids_BxT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """What each query sees of its own document, up to itself: [B, T, K, Q, H], as `attention.attend_causally` has it.

    A length that blocks do not divide is padded at its end, which no token looks at, and a head to whole lanes of 128.
    """
    length, per_kv, head_dim = q_BxTxKxQxH.shape[1], *q_BxTxKxQxH.shape[3:]
    wide = head_dim + -head_dim % LANES
    block = block_size(length, wide * q_BxTxKxQxH.dtype.itemsize)
    padded = length + -length % block
    pad = lambda u, axis: jnp.pad(
        u, [(0, padded - length if n == axis else wide - head_dim if n == u.ndim - 1 else 0) for n in range(u.ndim)]
    )
    q_BxKxQxTxH = pad(jnp.moveaxis(q_BxTxKxQxH * (1.0 / math.sqrt(head_dim)), 1, 3), 3)
    k_BxKxTxH, v_BxKxTxH = (pad(jnp.moveaxis(u, 1, 2), 2) for u in (k_BxTxKxH, v_BxTxKxH))
    ids = None
    if segment_ids_BxT is not None:
        ids_BxT = jnp.pad(segment_ids_BxT, ((0, 0), (0, padded - length)))
        ids = splash.SegmentIds(ids_BxT, ids_BxT)
    mask = splash.MultiHeadMask([splash.CausalMask((padded, padded))] * per_kv)
    one = splash.make_splash_mqa(mask, block_sizes=block_sizes(block), head_shards=1, q_seq_shards=1, interpret=interpret)
    # A vmapped dimension is one that a chip's two cores may share; the backward pass's own are not.
    heads_BxKxQxTxH = jax.vmap(jax.vmap(one, (0, 0, 0, None)))(q_BxKxQxTxH, k_BxKxTxH, v_BxKxTxH, ids)
    return jnp.moveaxis(heads_BxKxQxTxH[:, :, :, :length, :head_dim], 3, 1)


def block_size(length: int, head_bytes: int = 256) -> int:
    """Tokens of a block, in whole lanes: as few blocks as hold the sequence, of one size; half as large for wide heads."""
    blocks = -(-length // (BLOCK if head_bytes <= 512 else BLOCK // 2))
    return -(-length // (blocks * LANES)) * LANES


def block_sizes(block: int) -> splash.BlockSizes:
    """What splash attention's kernels take at once, of blocks of so many tokens."""
    # Keys are taken in halves of a block. Gradients are made by two kernels: a single one needs 5 matmuls where they take 7, but
    # writes the queries' gradients once for every block of keys, whose sum costs as much as that saves.
    part = block // 2 if block % (2 * LANES) == 0 else block
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=part,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=part,
        block_q_dq=block,
        block_kv_dq=block,
    )
