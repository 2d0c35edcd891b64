"""One layer's pieces at the published widths of the 30B, as XLA has them and by their kernels: what `chip.py` compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.model import flash, grouped
from elastic_jax.model.attention import attend_causally
from elastic_jax.model.conv import causal_conv
from elastic_jax.model.conv_kernel import conv_silu_by_kernel
from elastic_jax.model.fetch import Summed
from elastic_jax.model.flash import flash_attention
from elastic_jax.model.gated_norm_kernel import gated_norm_by_kernel
from elastic_jax.model.grouped_kernel import Corner
from elastic_jax.model.kernels import Target
from elastic_jax.model.losses import Students, kl_losses
from elastic_jax.model.norm import rms_norm
from elastic_jax.model.ssd import ssd
from elastic_jax.model.ssd_blocks import CHUNK
from elastic_jax.model.ssd_kernel import ssd_by_kernel


@dataclasses.dataclass(frozen=True)
class Piece:
    """`flops` and `bytes` are what the mathematics needs, forward and backward; `args` are (shape, dtype) pairs."""

    plain: Callable[..., jax.Array]
    kernel: Callable[..., jax.Array]
    args: tuple[tuple[tuple[int, ...], Any], ...]
    out: tuple[tuple[int, ...], Any]
    differentiable: int
    flops: float
    bytes: float
    blocks: Callable[[int], tuple[float, float]] | None = None  # cores -> blocks that run and that are skipped on one of them


def attention(length: int) -> Piece:
    kv, per_kv, head = 2, 16, 128
    heads, q, k = kv * per_kv, ((1, length, kv, per_kv, head), jnp.bfloat16), ((1, length, kv, head), jnp.bfloat16)
    # Two matmuls forward and five backward, over half the square; q, o, and k, v with their gradients.
    flops, size = 7 * heads * length**2 * head, 2 * length * head * (4 * heads + 4 * kv)
    across = -(-length // flash.block_size(length))
    done = across * (across + 1) / 2
    blocks = lambda cores: (heads * done / cores, heads * (across**2 - done) / cores)
    args = (q, k, k, ((1, length), jnp.int32))
    return Piece(attend_causally, flash_attention, args, q, 3, flops, size, blocks)


def state_space(heads: int, length: int = 8192) -> Piece:
    groups, p, n, q = 8, 64, 128, CHUNK
    x, bc = ((1, length, groups, heads // groups, p), jnp.bfloat16), ((1, length, groups, n), jnp.bfloat16)
    dt, a = ((1, length, groups, heads // groups), jnp.float32), ((groups, heads // groups), jnp.float32)
    flops = length * (heads * (6 * q * p + 14 * n * p) + groups * 8 * q * n)
    states = length / q * heads * p * n * 2
    size = length * (heads * p * (2 * 3 + 4 * 2) + groups * n * 2 * 6 + heads * 4 * 3) + 2 * states
    plain = lambda x, dt, a, b, c, ids: ssd(x, dt, a, b, c, ids, q)[0]
    args = (x, dt, a, bc, bc, ((1, length), jnp.int32))
    return Piece(plain, ssd_by_kernel, args, (x[0], jnp.float32), 5, flops, size)


def convolution(heads: int = 64, length: int = 8192) -> Piece:
    """Of x, with its SiLU."""
    channels, taps = heads * 64, 4
    u, plain = ((1, length, channels), jnp.bfloat16), lambda u, *rest: jax.nn.silu(causal_conv(u, *rest, None))
    args = (u, ((taps, channels), jnp.float32), ((channels,), jnp.float32), ((1, length), jnp.int32))
    # Forward reads and writes; backward reads both and writes.
    kernel = lambda *args: conv_silu_by_kernel(*args)[0]
    return Piece(plain, kernel, args, u, 3, 0.0, 2 * 5 * length * channels)


def gated_norm(heads: int = 64, length: int = 8192, groups: int = 8) -> Piece:
    """With the skip; y is in float32."""
    own, head = (1, length, groups, heads // groups, 64), ((groups, heads // groups), jnp.float32)

    def plain(y: jax.Array, x: jax.Array, z: jax.Array, d: jax.Array, scale: jax.Array) -> jax.Array:
        gated = (y + d[None, None, ..., None] * x.astype(jnp.float32)) * jax.nn.silu(z.astype(jnp.float32))
        return rms_norm(gated, scale, 1e-5, axes=(-2, -1)).astype(x.dtype)

    args = ((own, jnp.float32), (own, jnp.bfloat16), (own, jnp.bfloat16), head, (own[2:], jnp.float32))
    size = length * heads * 64 * (4 + 3 * 2 + 2 * (4 + 2 + 2) + 2)
    return Piece(plain, partial(gated_norm_by_kernel, eps=1e-5), args, (own, jnp.bfloat16), 5, 0.0, size)


EXPERTS, PER_BLOCK, TOP_K, WIDTH, EMBED = 128, 2, 6, 1856, 2688
CORNER = Corner(PER_BLOCK, WIDTH, EMBED)


def experts(length: int = 8192) -> Piece:
    """Gradients of the weights are in bfloat16; the kernels' sums, which a step takes as they are, are in float32."""
    pairs, weights = length * TOP_K, ((EXPERTS // PER_BLOCK, PER_BLOCK, WIDTH, EMBED), jnp.bfloat16)

    def form(kernels: bool, x: jax.Array, up: jax.Array, down: jax.Array, shares: jax.Array, ids: jax.Array) -> jax.Array:
        def network(rows: jax.Array, matmuls: grouped.Matmuls, w: grouped.Weights) -> grouped.Outputs:
            hidden, _ = matmuls.into(rows, w['up'])
            activation = jnp.square(jax.nn.relu(hidden.astype(jnp.float32))) * matmuls.of_pairs(shares)[:, None]
            return (matmuls.out_of(activation.astype(hidden.dtype), w['down'])[0],), w

        w, target = {'up': Summed(up), 'down': Summed(down)}, Target(kernels=kernels)
        return grouped.apply_experts(x, ids, EXPERTS, CORNER, network, w, target=target, complete=True)[0][0]

    args = (((length, EMBED), jnp.bfloat16), weights, weights, ((TOP_K, length), jnp.float32), ((TOP_K, length), jnp.int32))
    size = 2 * (3 * 2 * EXPERTS * WIDTH * EMBED + 6 * pairs * (EMBED + WIDTH))
    out = ((length, EMBED), jnp.bfloat16)
    return Piece(partial(form, False), partial(form, True), args, out, 4, 12 * pairs * WIDTH * EMBED, size)


VOCAB, HEADS_OF, TOKENS = 131072, (2688, 2240, 1856), 1024  # the embedding of each budget; tokens of a chunk


def head(length: int = 8192) -> Piece:
    """The unembedding of the teacher and of all budgets, with the divergence between them and its gradients."""
    hidden = [((1, length, width), jnp.bfloat16) for width in HEADS_OF]
    kernel = ((HEADS_OF[0], VOCAB), jnp.bfloat16)
    count = len(HEADS_OF)

    def form(kernels: bool, *args: jax.Array) -> jax.Array:
        students, teacher = Students(args[:count], args[count]), args[count + 1 : -1]
        return kl_losses([students], [1.0] * count, teacher, args[-1], float(length), TOKENS, target=Target(kernels=kernels))[0]

    # One matmul of the teacher, three of every budget; both tables and every hidden state once, with its gradient.
    flops = 2 * length * VOCAB * (HEADS_OF[0] + 3 * sum(HEADS_OF))
    size = 2 * ((HEADS_OF[0] + 2 * sum(HEADS_OF)) * length + 3 * HEADS_OF[0] * VOCAB)
    args = (*hidden, kernel, hidden[0], kernel, ((1, length), jnp.float32))
    return Piece(partial(form, False), partial(form, True), args, ((), jnp.float32), count + 1, flops, size)


PIECES = {
    'attention 8192': attention(8192),
    'attention 49152': attention(49152),
    'ssd 64 heads 8192': state_space(64),
    'ssd 56 heads 8192': state_space(56),
    'conv 64 heads 8192': convolution(),
    'norm 64 heads 8192': gated_norm(),
    'norm 56 heads 8192': gated_norm(56),
    'experts 8192': experts(),
    'head 8192': head(),
}


def both_ways(form: Callable[..., jax.Array], piece: Piece) -> Callable[..., Any]:
    def run(grad: jax.Array, *args: jax.Array) -> Any:
        n = piece.differentiable
        y, backward = jax.vjp(lambda *some: form(*some, *args[n:]), *args[:n])
        return y, backward(grad)

    return run
