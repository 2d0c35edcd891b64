"""Lockstep: all budgets of a step go through the decoder together, layer by layer, each on its static slice.

Layers outside, budgets inside: a layer's weights are fetched once for all budgets, and every budget costs what its size costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from elastic_jax.arch import Arch
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.context import Context
from elastic_jax.model.decoder import apply_block, embed_tokens, final_norm, unembedding
from elastic_jax.model.params import Param, Table, layer_name, param_table
from elastic_jax.nest.slice import slice_leaf

Aux = dict[str, dict[str, jax.Array]]


def lockstep(
    params: dict[str, Any],
    tokens_BxT: jax.Array,
    parent: Arch,
    archs: Sequence[Arch],
    context: Context,
    layout: Layout = FLAT,
    remat: bool = False,
) -> tuple[list[tuple[jax.Array, jax.Array]], list[Aux]]:
    """((final hidden states [B, T, D'], unembedding [D', V]) of every budget, its aux by block).

    `params` are the parent's; gradients of the slices land in them by autodiff.
    """
    full = param_table(parent, layout)
    tables = [param_table(arch, layout) for arch in archs]
    streams = []
    for table in tables:
        embedding = {'embedding': _slice_group(params, full, table, 'embedding')}
        streams.append(embed_tokens(embedding, tokens_BxT, context.dtype))
    auxes: list[Aux] = [{} for _ in archs]
    for i in range(len(parent.mixers)):
        name = layer_name(i)
        alive = [n for n, arch in enumerate(archs) if arch.mixers[i] is not None]
        if not alive:
            continue

        def layer(weights: dict[str, jax.Array], inputs: list[jax.Array], i: int = i, alive: list[int] = alive) -> list[Any]:
            outputs = []
            for n, x_BxTxD in zip(alive, inputs, strict=True):
                sliced = _slice_params(weights, full[layer_name(i)], tables[n][layer_name(i)], layer_name(i))
                x_BxTxD, _, aux = apply_block(sliced, x_BxTxD, archs[n].mixers[i], context)
                outputs.append((x_BxTxD, aux))
            return outputs

        run = jax.checkpoint(layer) if remat else layer
        for n, (x_BxTxD, aux) in zip(alive, run(params[name], [streams[n] for n in alive]), strict=True):
            streams[n], auxes[n][name] = x_BxTxD, aux
    heads = []
    for x_BxTxD, table in zip(streams, tables, strict=True):
        rest = {group: _slice_group(params, full, table, group) for group in table if not group.startswith('layer_')}
        heads.append((final_norm(rest, x_BxTxD, context), unembedding(rest)))
    return heads, auxes


def _slice_group(params: dict[str, Any], full: Table, small: Table, group: str) -> dict[str, jax.Array]:
    return _slice_params(params[group], full[group], small[group], group)


def _slice_params(
    leaves: dict[str, jax.Array], full: dict[str, Param], small: dict[str, Param], group: str
) -> dict[str, jax.Array]:
    return {name: slice_leaf(leaves[name], full[name], param, f'{group}/{name}') for name, param in small.items()}
