"""The mixture-of-experts mixer: route, run the chosen experts, add the shared one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.arch import MoE
from elastic_jax.model.collectives import enter, gather_rows, leave, part_index, scatter_rows, total
from elastic_jax.model.context import HARD, Context, Mixed, Soft
from elastic_jax.model.fetch import Summed
from elastic_jax.model.grouped import Matmuls, Outputs, Weights, apply_experts
from elastic_jax.model.grouped_kernel import Corner
from elastic_jax.model.mlp import feed_forward


def moe(params: dict[str, jax.Array], x_BxTxD: jax.Array, mixer: MoE, context: Context, cache: None, soft: Soft = HARD) -> Mixed:
    """The MoE mixer. Experts are stored (G, E/G); their weights may be a parent's, of which the mixer's corner is used.

    Split over devices, each runs its own experts for every token: over mesh axes that also split the batch the tokens are
    gathered and the outputs reduce-scattered. With several choices a token goes to nearly every part anyhow, and nothing is
    dropped whatever the routing.

    Aux: `expert_load` [E], the share of (real token, choice) pairs of each expert; `balance_loss`, the auxiliary loss of
    Switch Transformers (arXiv 2101.03961, equation 4), 1 when balanced.
    """
    del cache
    batch, length, embed = x_BxTxD.shape
    x_NxD = x_BxTxD.reshape(-1, embed)
    merge = lambda name: params[name].reshape(-1, *params[name].shape[2:])
    share_E = None if soft.experts is None else soft.experts.reshape(-1)
    bias_E = merge('correction_bias') if mixer.correction_bias else None
    router_DxE = params['router'].reshape(embed, -1)
    ids_NxK, weights_NxK, scores_NxE = route(x_NxD, router_DxE, bias_E, mixer, share_E)

    weights = {name: _weights(own, x_NxD.dtype) for name, own in params.items() if name.startswith('expert_')}

    axes = context.shards.of('experts_blocks')
    row_axes = tuple(axis for axis in axes if axis in context.shards.data)
    unit_axes = tuple(axis for axis in axes if axis not in row_axes)
    corner = Corner(params['router'].shape[2], mixer.expert_width, embed)
    experts = weights['expert_up'].w.shape[0] * corner.experts
    own_NxK = ids_NxK
    if axes:
        own_NxK = gather_rows(ids_NxK, row_axes) - part_index(axes) * experts
        own_NxK = jnp.where((own_NxK >= 0) & (own_NxK < experts), own_NxK, experts)
    rows_NxD = gather_rows(enter(x_NxD, unit_axes), row_axes)
    shares_KxN = gather_rows(enter(weights_NxK, unit_axes), row_axes).T

    def network(rows_RxD: jax.Array, matmuls: Matmuls, weights: Weights) -> Outputs:
        used, dtype, wide = {}, rows_RxD.dtype, lambda u: u.astype(jnp.float32)  # so XLA fuses all gradients of what follows
        hidden, used['expert_up'] = matmuls.into(rows_RxD, weights['expert_up'])
        if mixer.activation == 'swiglu':
            gate, used['expert_gate'] = matmuls.into(rows_RxD, weights['expert_gate'])
            activation = jax.nn.silu(wide(gate)) * wide(hidden)
        else:
            activation = jnp.square(jax.nn.relu(wide(hidden)))
        # Weighed before the last matmul, whose output no gradient then asks for: remat computes it no second time.
        weighed = (activation * matmuls.of_pairs(shares_KxN)[:, None]).astype(dtype)
        out, used['expert_down'] = matmuls.out_of(weighed, weights['expert_down'])
        if not context.taps:
            return (out,), used
        return (out, jnp.linalg.norm(out.astype(jnp.float32), axis=-1), activation), used

    differentiable = context.length_B is None  # with a cache nothing is trained
    (sum_NxD, *tapped), summed = apply_experts(
        rows_NxD, own_NxK.T, experts, corner, network, weights, differentiable, context.target, complete=not axes
    )
    y_NxD = leave(scatter_rows(sum_NxD, row_axes), unit_axes)
    aux = _load(ids_NxK, scores_NxE, context)
    if context.taps:
        shape = (batch, length, mixer.top_k)
        of_pair = lambda tap_KxN: jnp.moveaxis(tap_KxN, 0, 1).reshape(*shape, *tap_KxN.shape[2:])
        aux |= {'expert_ids': ids_NxK.reshape(shape)}
        aux |= dict(zip(('expert_norms', 'expert_width'), map(of_pair, tapped), strict=True))
    if mixer.shared_width:
        up, gate, down = (params.get(f'shared_{name}') for name in ('up', 'gate', 'down'))
        shared_axes = context.shards.of('shared_width_blocks')
        shared_NxD, shared_NxF = feed_forward(x_NxD, up, gate, down, axes=shared_axes)
        y_NxD = y_NxD + shared_NxD
        if context.taps:
            aux['shared_width'] = shared_NxF.reshape(batch, length, -1)
    return Mixed(y_NxD.reshape(batch, length, embed), None, aux, summed)


def _weights(stored: jax.Array | Summed, dtype: Any) -> Summed:
    own = stored if isinstance(stored, Summed) else Summed(stored)
    return dataclasses.replace(own, w=own.w.astype(dtype))


def route(
    x_NxD: jax.Array, router_DxE: jax.Array, bias_E: jax.Array | None, mixer: MoE, share_E: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(expert ids [N, K], their weights [N, K], scores [N, E]), all in float32.

    Experts are chosen by score + correction bias, inside the best routing groups (a group's score is the sum of its two
    best), and weighed by the score alone. A share of 0 removes an expert before softmax and before group scores, so that it
    is never chosen, whatever the signs of scores and biases.
    """
    logits_NxE = x_NxD.astype(jnp.float32) @ router_DxE.astype(jnp.float32)
    if share_E is not None:
        dropped_E = share_E <= 0
        log_share_E = jnp.where(dropped_E, -jnp.inf, jnp.log(jnp.where(dropped_E, 1.0, share_E)))
    if mixer.scoring == 'softmax':
        scores_NxE = jax.nn.softmax(logits_NxE if share_E is None else logits_NxE + log_share_E[None], axis=-1)
    else:
        scores_NxE = jax.nn.sigmoid(logits_NxE) * (1.0 if share_E is None else share_E[None])
    choice_NxE = jax.lax.stop_gradient(scores_NxE if bias_E is None else scores_NxE + bias_E[None])
    if share_E is not None:
        choice_NxE = choice_NxE + jax.lax.stop_gradient(log_share_E)[None]
    if mixer.groups > 1:
        grouped_NxGxE = choice_NxE.reshape(choice_NxE.shape[0], mixer.groups, -1)
        group_scores_NxG = jax.lax.top_k(grouped_NxGxE, 2)[0].sum(-1)
        _, best_NxG = jax.lax.top_k(group_scores_NxG, mixer.top_groups)
        allowed_NxG = jax.nn.one_hot(best_NxG, mixer.groups, dtype=bool).any(axis=1)
        choice_NxE = jnp.where(allowed_NxG[..., None], grouped_NxGxE, -jnp.inf).reshape(choice_NxE.shape)
    _, ids_NxK = jax.lax.top_k(choice_NxE, mixer.top_k)
    weights_NxK = jnp.take_along_axis(scores_NxE, ids_NxK, axis=-1)
    if mixer.normalize:
        weights_NxK = weights_NxK / (weights_NxK.sum(-1, keepdims=True) + 1e-20)
    return ids_NxK, weights_NxK * mixer.scale, scores_NxE


def _load(ids_NxK: jax.Array, scores_NxE: jax.Array, context: Context) -> dict[str, jax.Array]:
    experts = scores_NxE.shape[-1]
    real_N = jnp.ones(ids_NxK.shape[0]) if context.segment_ids_BxT is None else (context.segment_ids_BxT.reshape(-1) > 0) * 1.0
    count = jnp.maximum(total(real_N.sum(), context.shards.data), 1.0)
    pairs_E = total(jnp.zeros(experts).at[ids_NxK].add(real_N[:, None]), context.shards.data)
    load_E = pairs_E / (count * ids_NxK.shape[-1])
    # The mean over this device's tokens divided by everyone's number: the devices' losses add up to the whole batch's.
    probability_NxE = scores_NxE / (scores_NxE.sum(-1, keepdims=True) + 1e-20)
    mean_E = (probability_NxE * real_N[:, None]).sum(0) / count
    return {
        'expert_load': jax.lax.stop_gradient(load_E),
        'balance_loss': experts * jnp.sum(jax.lax.stop_gradient(load_E) * mean_E),
    }
