"""The decoder: embedding, blocks, final norm, unembedding, as pure functions and as one Linen module."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from elastic_jax.arch import MLP, Arch, Attention, Mamba, Mixer, MoE
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.attention import attention
from elastic_jax.model.collectives import Axes, leave, part_index
from elastic_jax.model.context import HARD, Context, Mixed, Soft, context_for
from elastic_jax.model.kernels import row_major
from elastic_jax.model.mamba import mamba
from elastic_jax.model.mlp import mlp
from elastic_jax.model.moe import moe
from elastic_jax.model.norm import rms_norm
from elastic_jax.model.params import Param, layer_name, param_dtype, param_table

APPLY = {Attention: attention, Mamba: mamba, MLP: mlp, MoE: moe}


def embed_tokens(params: dict[str, Any], tokens_BxT: jax.Array, dtype: Any = jnp.float32, axes: Axes = ()) -> jax.Array:
    """The residual stream before the first block, [B, T, D]; `axes` are the mesh axes that split the vocabulary."""
    table_VxD = params['embedding']['table'].astype(dtype)
    if not axes:
        return table_VxD[tokens_BxT]
    own_BxT = tokens_BxT - part_index(axes) * table_VxD.shape[0]
    own_BxT = jnp.where(own_BxT >= 0, own_BxT, table_VxD.shape[0])
    return leave(jnp.take(table_VxD, own_BxT, axis=0, mode='fill', fill_value=0), axes)


def apply_block(
    layer: dict[str, jax.Array],
    x_BxTxD: jax.Array,
    mixer: Mixer,
    context: Context,
    cache: Any = None,
    soft: Soft = HARD,
) -> Mixed:
    """x + keep · mixer(norm(x))."""
    normed_BxTxD = rms_norm(x_BxTxD, layer['norm'], context.norm_eps, soft.embed_ratio)
    mixed = APPLY[type(mixer)](layer, normed_BxTxD, mixer, context, cache, soft)
    aux = {**mixed.aux, 'normed': normed_BxTxD} if context.taps else mixed.aux
    y_BxTxD = x_BxTxD + (soft.keep * mixed.y_BxTxD).astype(x_BxTxD.dtype)
    return mixed._replace(y_BxTxD=row_major(y_BxTxD, context.target), aux=aux)


def final_norm(params: dict[str, Any], x_BxTxD: jax.Array, context: Context, embed_ratio: Any = 1.0) -> jax.Array:
    return rms_norm(x_BxTxD, params['final_norm']['norm'], context.norm_eps, embed_ratio)


def unembedding(params: dict[str, Any]) -> jax.Array:
    """The matrix [D, V] that turns final hidden states into logits."""
    return params['unembed']['kernel'] if 'unembed' in params else params['embedding']['table'].T


def unembed(params: dict[str, Any], hidden: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """Logits [..., V] in float32 of final hidden states [..., D]."""
    return jnp.matmul(hidden, unembedding(params).astype(dtype), preferred_element_type=jnp.float32)


def hidden_states(
    params: dict[str, Any],
    tokens_BxT: jax.Array,
    arch: Arch,
    context: Context,
    soft: dict[str, Soft] | None = None,
    remat: bool = False,
) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
    """(final hidden states [B, T, D], aux by block). `soft` holds a Soft for each block and for `final_norm`."""
    x_BxTxD, aux = embed_tokens(params, tokens_BxT, context.dtype), {}
    for i, mixer in enumerate(arch.mixers):
        if mixer is not None:
            name = layer_name(i)

            def block(layer: Any, x: jax.Array, block_soft: Soft, mixer: Mixer = mixer) -> tuple[jax.Array, Any]:
                mixed = apply_block(layer, x, mixer, context, None, block_soft)
                return mixed.y_BxTxD, mixed.aux

            run = jax.checkpoint(block) if remat else block
            x_BxTxD, aux[name] = run(params[name], x_BxTxD, HARD if soft is None else soft[name])
    ratio = 1.0 if soft is None else soft['final_norm'].embed_ratio
    return final_norm(params, x_BxTxD, context, ratio), aux


def logits(
    params: dict[str, Any],
    tokens_BxT: jax.Array,
    arch: Arch,
    segment_ids_BxT: jax.Array | None = None,
    positions_BxT: jax.Array | None = None,
    soft: dict[str, Soft] | None = None,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Logits [B, T, V] in float32."""
    context = context_for(tokens_BxT, segment_ids_BxT, positions_BxT, norm_eps=arch.norm_eps, dtype=dtype)
    x_BxTxD, _ = hidden_states(params, tokens_BxT, arch, context, soft)
    return unembed(params, x_BxTxD, dtype)


class _Group(nn.Module):
    """Declares one group of the table of parameters."""

    group: tuple[tuple[str, Param], ...]
    dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        return {name: self.param(name, p.init, p.shape, param_dtype(p, self.dtype)) for name, p in self.group}


class Decoder(nn.Module):
    """The decoder as a Linen module: `Decoder(arch).apply({'params': params}, tokens_BxT)` gives logits [B, T, V].

    Linen checks every shape against the table, so parameters that were not sliced for `arch` raise.
    """

    arch: Arch
    layout: Layout = FLAT
    param_dtype: Any = jnp.float32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens_BxT: jax.Array, segment_ids_BxT: jax.Array | None = None, positions_BxT: jax.Array | None = None
    ) -> jax.Array:
        table = param_table(self.arch, self.layout)
        params = {group: _Group(tuple(table[group].items()), self.param_dtype, name=group)() for group in table}
        return logits(params, tokens_BxT, self.arch, segment_ids_BxT, positions_BxT, dtype=self.dtype)
