"""The Mamba-2 mixer: causal convolution, chunked state-space duality (SSD), gated grouped norm."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elastic_jax.arch import Mamba
from elastic_jax.model.collectives import enter, leave
from elastic_jax.model.context import HARD, Context, Mixed, Soft
from elastic_jax.model.conv import causal_conv
from elastic_jax.model.conv_kernel import conv_silu_by_kernel, fits_conv_kernel
from elastic_jax.model.gated_norm_kernel import fits_gated_norm_kernel, gated_norm_by_kernel
from elastic_jax.model.kernels import by_kernel
from elastic_jax.model.linear import into, out_of
from elastic_jax.model.norm import rms_norm
from elastic_jax.model.ssd import ssd, ssd_step
from elastic_jax.model.ssd_blocks import fits_ssd_kernel
from elastic_jax.model.ssd_kernel import ssd_by_kernel
from elastic_jax.model.ssd_triton import fits_ssd_triton, ssd_by_triton

CPU_CHUNK = 64  # tokens; what is made for every pair of a chunk's tokens costs a CPU more than passing states on


class MambaCache(NamedTuple):
    """The last conv-1 inputs of each convolution, [B, conv-1, ...], and the SSM state [B, G, M, P, N] in float32."""

    x: jax.Array
    b: jax.Array
    c: jax.Array
    state_BxGxMxPxN: jax.Array


class MambaTrial(NamedTuple):
    """A chunk that was run but is not in the cache yet: `settle` takes in as many of its tokens as are kept.

    It holds what the recurrence is computed from, which is much less than a state for every token, and settling reads no
    weights. `inputs` are the convolutions'.
    """

    before: MambaCache
    inputs: dict[str, jax.Array]
    x_BxTxGxMxP: jax.Array
    dt_BxTxGxM: jax.Array
    a_GxM: jax.Array
    b_BxTxGxN: jax.Array
    c_BxTxGxN: jax.Array


def init_mamba_cache(mixer: Mamba, batch: int, dtype: jnp.dtype) -> MambaCache:
    g, m, p, n = mixer.groups, mixer.heads_per_group, mixer.head_dim, mixer.state
    window = (batch, mixer.conv - 1, g)
    return MambaCache(
        jnp.zeros((*window, m, p), dtype),
        jnp.zeros((*window, n), dtype),
        jnp.zeros((*window, n), dtype),
        jnp.zeros((batch, g, m, p, n), jnp.float32),
    )


def mamba(
    params: dict[str, jax.Array],
    x_BxTxD: jax.Array,
    mixer: Mamba,
    context: Context,
    cache: MambaCache | None,
    soft: Soft = HARD,
) -> Mixed:
    """The Mamba-2 mixer (arXiv 2405.21060). G groups share B and C; each has M heads of P channels and a state of N."""
    axes = context.shards.of('mamba_groups')
    x_BxTxD = enter(x_BxTxD, axes)
    project = lambda name: into(x_BxTxD, params[name], context.target)
    inputs = {name: project(name) for name in ('x', 'b', 'c')}
    convolved = {}
    for name, u in inputs.items():
        past = None if cache is None else getattr(cache, name)
        kernel, bias = params[f'conv_{name}'], params.get(f'conv_{name}_bias')
        convolved[name] = _conv_silu(u, kernel, bias, context, past, users=2 if name == 'x' else 1)
    (x_BxTxGxMxP, skipped_BxTxGxMxP), (b_BxTxGxN,), (c_BxTxGxN,) = (convolved[name] for name in ('x', 'b', 'c'))

    dt_BxTxGxM = jax.nn.softplus(project('dt').astype(jnp.float32) + params['dt_bias'][None, None])
    dt_BxTxGxM = jnp.clip(dt_BxTxGxM, mixer.dt_min, mixer.dt_max)
    a_GxM = -jnp.exp(params['a_log'])
    if cache is None:
        operands = x_BxTxGxMxP, dt_BxTxGxM, a_GxM, b_BxTxGxN, c_BxTxGxN, context.segment_ids_BxT
        kernel = ssd_by_kernel if fits_ssd_kernel(x_BxTxGxMxP.shape, mixer.state) else None
        cuda = ssd_by_triton if fits_ssd_triton(x_BxTxGxMxP.shape, mixer.state) else None
        plain = lambda *args: ssd(*args, mixer.chunk)[0]
        y_BxTxGxMxP = by_kernel(context.target, kernel, plain, *operands, cuda=cuda)
    else:
        trial = MambaTrial(cache, inputs, x_BxTxGxMxP, dt_BxTxGxM, a_GxM, b_BxTxGxN, c_BxTxGxN)
        y_BxTxGxMxP, cache = settle(trial, context.valid_B, mixer)
        cache = trial if context.trial else cache
    operands = y_BxTxGxMxP, skipped_BxTxGxMxP, project('z'), params['d'], params['gated_norm']
    normed_BxTxGxMxP = _gated_norm(operands, context, cache, soft.gated_ratio)
    y_BxTxD = leave(out_of(normed_BxTxGxMxP.reshape(*x_BxTxD.shape[:2], -1), params['out'], context.target), axes)
    return Mixed(y_BxTxD, cache, {'mamba': inputs['x']} if context.taps else {})


def _conv_silu(
    u_BxTxC: jax.Array,
    kernel_KxC: jax.Array,
    bias_C: jax.Array | None,
    context: Context,
    past_BxKxC: jax.Array | None,
    users: int,
) -> tuple[jax.Array, ...]:
    """silu of the causal convolution, once for each of its users; C is several dimensions."""
    plain = lambda u, kernel, bias, ids: (jax.nn.silu(causal_conv(u, kernel, bias, ids, past_BxKxC)),) * users
    fits = past_BxKxC is None and fits_conv_kernel(u_BxTxC.shape, len(kernel_KxC))
    kernel = partial(conv_silu_by_kernel, users=users) if fits else None
    return by_kernel(context.target, kernel, plain, u_BxTxC, kernel_KxC, bias_C, context.segment_ids_BxT)


def _gated_norm(operands: tuple[jax.Array, ...], context: Context, cache: Any, ratio: Any) -> jax.Array:
    """The skip, gate and grouped norm of (y, x, z, d, scale): [B, T, G, M, P] in x's type."""

    axes = context.shards.of('mamba_groups')

    def plain(y: jax.Array, x: jax.Array, z: jax.Array, d_GxM: jax.Array, scale: jax.Array) -> jax.Array:
        y = y + d_GxM[None, None, ..., None] * x.astype(jnp.float32)
        gated = y * jax.nn.silu(z.astype(jnp.float32))
        return rms_norm(gated, scale, context.norm_eps, enter(ratio, axes), axes=(-2, -1)).astype(x.dtype)

    # A masked model, whose ratio is learned, is for search: it has no kernel.
    fits = cache is None and isinstance(ratio, float) and fits_gated_norm_kernel(operands[1].shape)
    kernel = partial(gated_norm_by_kernel, eps=context.norm_eps) if fits else None
    return by_kernel(context.target, kernel, plain, *operands)


def settle(trial: MambaTrial, kept_B: jax.Array, mixer: Mamba) -> tuple[jax.Array, MambaCache]:
    """(y [B, T, G, M, P] of the recurrence, the cache after each row's first `kept_B` tokens)."""
    # A token that is not kept takes a step of zero length, which leaves the state as it is.
    real_BxT = jnp.arange(trial.dt_BxTxGxM.shape[1])[None] < kept_B[:, None]
    dt_BxTxGxM = jnp.where(real_BxT[..., None, None], trial.dt_BxTxGxM, 0.0)
    chunked = lambda chunk: lambda *args: ssd(*args[:5], None, chunk, args[5])
    prefill = partial(jax.lax.platform_dependent, cpu=chunked(min(CPU_CHUNK, mixer.chunk)), default=chunked(mixer.chunk))
    run = ssd_step if real_BxT.shape[1] == 1 else prefill
    inputs = trial.x_BxTxGxMxP, dt_BxTxGxM, trial.a_GxM, trial.b_BxTxGxN, trial.c_BxTxGxN
    y_BxTxGxMxP, state = run(*inputs, trial.before.state_BxGxMxPxN)
    history = {name: _last_inputs(getattr(trial.before, name), u, kept_B) for name, u in trial.inputs.items()}
    return y_BxTxGxMxP, MambaCache(**history, state_BxGxMxPxN=state)


def _last_inputs(past_BxKxC: jax.Array, u_BxTxC: jax.Array, valid_B: jax.Array) -> jax.Array:
    """The K-1 inputs up to and including each row's last real token."""
    joined = jnp.concatenate([past_BxKxC.astype(u_BxTxC.dtype), u_BxTxC], axis=1)
    take = lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, past_BxKxC.shape[1], axis=0)
    return jax.vmap(take)(joined, valid_B).astype(past_BxKxC.dtype)
