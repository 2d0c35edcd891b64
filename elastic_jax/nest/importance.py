"""Importance of every unit of every axis, by forward passes over a calibration stream (method.md §3).

Statistics are sums over real tokens, so batches and hosts are merged by adding them; `scores` turns the sums into one score
per unit.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.arch import AXES, Arch, Attention, Mamba, MoE
from elastic_jax.layout import FLAT, Layout, to_ranked
from elastic_jax.model.context import HARD, Soft, context_for
from elastic_jax.model.decoder import hidden_states, unembedding
from elastic_jax.model.params import layer_name

Sums = dict[str, dict[str, jax.Array]]


@partial(jax.jit, static_argnames=('arch', 'dtype'))
def batch_sums(params: dict[str, Any], batch: dict[str, jax.Array], arch: Arch, dtype: Any = jnp.float32) -> Sums:
    """The statistics of one batch: block name -> statistic -> sum over its real tokens, in float32.

    Blocked axes come in stored order, merged: KV heads [K], MLP channels [F], experts [E].
    """
    segment_ids_BxT = batch['segment_ids']
    context = context_for(batch['tokens'], segment_ids_BxT, batch['positions'], norm_eps=arch.norm_eps, taps=True, dtype=dtype)
    _, taps = hidden_states(params, batch['tokens'], arch, context)
    real_BxT = (segment_ids_BxT > 0).astype(jnp.float32)
    total = partial(_token_sum, real_BxT)
    sums: Sums = {}
    for name, tap in taps.items():
        own = {'embed': total(jnp.abs(tap['normed']))}
        if 'mamba' in tap:
            own['mamba'] = total(tap['mamba'])
        if 'heads' in tap:
            own['heads'] = total(jnp.sum(jnp.square(tap['heads'].astype(jnp.float32)), axis=-1))
        own |= {axis: total(jnp.abs(tap[axis])) for axis in _channel_axes(tap)}
        if 'expert_ids' in tap:
            own |= expert_sums(tap['expert_ids'], tap['expert_norms'], real_BxT, _experts(arch, name))
            pairs = jax.nn.one_hot(tap['expert_ids'], _experts(arch, name)) * real_BxT[..., None, None]
            own['expert_width'] = jnp.einsum('btke,btkf->ef', pairs, jnp.abs(tap['expert_width'].astype(jnp.float32)))
        sums[name] = own
    return sums


def _channel_axes(found: Container[str]) -> list[str]:
    """The axes whose units are channels that a mixer taps under the axis's name: their score is Σ|activation|."""
    return [axis for axis in AXES if axis in found and axis not in ('embed', 'experts', 'expert_width')]


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: batch[key] for key in ('tokens', 'segment_ids', 'positions')}


def _token_sum(real_BxT: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.tensordot(real_BxT, values.astype(jnp.float32), axes=2)


def _experts(arch: Arch, name: str) -> int:
    return next(m.experts for i, m in enumerate(arch.mixers) if layer_name(i) == name)


def expert_sums(ids: jax.Array, norms: jax.Array, real: jax.Array, experts: int) -> dict[str, jax.Array]:
    """REAP's sums for each expert [E] over the tokens routed to it: the norms of its outputs, weighed by the gate, and their
    number (arXiv 2510.13999).
    """
    pairs = jax.nn.one_hot(ids, experts) * real[..., None, None]
    routed = jnp.einsum('...ke,...k->...e', pairs, norms)
    over_tokens = tuple(range(ids.ndim - 1))
    return {'saliency': routed.sum(over_tokens), 'routed': pairs.sum((*over_tokens, ids.ndim - 1))}


def add_sums(a: Sums | None, b: Sums) -> Sums:
    return b if a is None else jax.tree.map(jnp.add, a, b)


def accumulate(params: dict[str, Any], batches: Iterable[dict[str, Any]], arch: Arch, dtype: Any = jnp.float32) -> Sums:
    """The statistics of a stream of batches."""
    sums = None
    for batch in batches:
        sums = add_sums(sums, batch_sums(params, _inputs(batch), arch, dtype))
    return sums


def scores(sums: Sums, arch: Arch, layout: Layout = FLAT) -> dict[str, dict[str, np.ndarray]]:
    """Score of every unit: {'embedding': {'embed': [D]}, 'layer_000': {axis: scores}, …}.

    Units are in rank order of the layout (for G = 1: as stored).

    Shapes: mamba_heads [G, M] (ranked inside the group), mamba_head_dim [P], query_heads [K, Q] (ranked inside the KV head),
    kv_heads [K], mlp and shared_width [F], experts [E], expert_width [E, F] (each expert has its own ranking).
    """
    sums = jax.tree.map(np.asarray, sums)
    result = {'embedding': {'embed': sum(own['embed'] for own in sums.values())}}
    for i, mixer in enumerate(arch.mixers):
        own = sums.get(layer_name(i), {})
        # Stored (G, n/G) and merged by the forward pass: back to rank order.
        unblock = lambda x, axis, mixer=mixer: _unblock(x, layout.blocks(axis, mixer))
        ranked = {axis: unblock(own[axis], axis) for axis in _channel_axes(own)}
        if isinstance(mixer, Mamba):
            s_GxMxP = own['mamba']
            ranked['mamba_head_dim'] = np.linalg.norm(s_GxMxP.reshape(-1, mixer.head_dim), axis=0)
            # Heads are judged on the channels that matter most (Minitron-SSM, arXiv 2504.11409).
            top = np.argsort(-ranked['mamba_head_dim'])[: max(1, mixer.head_dim // 2)]
            ranked['mamba_heads'] = np.linalg.norm(s_GxMxP[..., top], axis=-1)
        elif isinstance(mixer, Attention):
            ranked['query_heads'] = unblock(np.sqrt(own['heads']), 'kv_heads')
            ranked['kv_heads'] = unblock(np.sqrt(own['heads'].sum(-1)), 'kv_heads')
        elif isinstance(mixer, MoE):
            saliency = own['saliency'] / np.maximum(own['routed'], 1.0)
            # Routing groups are contiguous by nature, in every layout.
            in_order = unblock if mixer.groups == 1 else lambda x, axis: x
            ranked['experts'], ranked['expert_width'] = in_order(saliency, 'experts'), in_order(own['expert_width'], 'experts')
        if ranked:
            result[layer_name(i)] = ranked
    return result


def _unblock(x: np.ndarray, blocks: int) -> np.ndarray:
    return to_ranked(x.reshape(blocks, -1, *x.shape[1:]))


@partial(jax.jit, static_argnames=('arch', 'dtype'))
def _gated_error(
    params: dict[str, Any], batch: dict[str, jax.Array], keep_L: jax.Array, arch: Arch, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Σ(logits_full − logits_gated)² and Σ logits_full² of one batch; the gates are an input, so this compiles once."""
    context = context_for(batch['tokens'], batch['segment_ids'], batch['positions'], norm_eps=arch.norm_eps, dtype=dtype)
    gated = {layer_name(i): Soft(keep=keep_L[i]) for i in range(len(arch.mixers))} | {'final_norm': HARD}
    w_DxV = unembedding(params).astype(dtype)
    real_BxTx1 = (batch['segment_ids'] > 0)[..., None]
    out = lambda soft: hidden_states(params, batch['tokens'], arch, context, soft)[0] @ w_DxV * real_BxTx1
    full_BxTxV, gated_BxTxV = out(None), out(gated)
    square_sum = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)))
    return square_sum(full_BxTxV - gated_BxTxV), square_sum(full_BxTxV)


def rank_layers(
    params: dict[str, Any], batches: list[dict[str, Any]], arch: Arch, min_units: int = 1, dtype: Any = jnp.float32
) -> tuple[tuple[int, ...], list[float]]:
    """(drop units from most to least important, the error at which each was taken out, last unit first).

    Iterative: with the units found unimportant so far already gone, the next to go is the one whose removal changes the
    logits least, s_j = Σ(M_full − M_without_j)² / Σ M_full². Stops at `min_units`; those left are ordered by that last round.
    """
    batches = [_inputs(batch) for batch in batches]
    alive = sorted(arch.kept_units())
    removed: list[int] = []
    errors: list[float] = []
    round_errors: dict[int, float] = {}
    while len(alive) > min_units:
        round_errors = {}
        for unit in alive:
            keep = np.repeat([u in alive and u != unit for u in range(arch.units)], arch.unit_blocks).astype(np.float32)
            sums = [_gated_error(params, batch, keep, arch, dtype) for batch in batches]
            round_errors[unit] = float(sum(error for error, _ in sums) / sum(norm for _, norm in sums))
        worst = min(alive, key=lambda unit: round_errors[unit])
        errors.append(round_errors[worst])
        removed.append(worst)
        alive.remove(worst)
    alive.sort(key=lambda unit: -round_errors.get(unit, 0.0))
    return (*alive, *reversed(removed)), errors
