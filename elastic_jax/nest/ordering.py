"""Ordering: permuting every axis once into order of importance, which leaves the parent's function unchanged.

An ordering is a tree of integer permutations: entry r is the old index of the unit of rank r. It has the shape of
`importance.scores`, with {'layers': {'ranking': [units]}} beside it when depth was ranked.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.arch import AXES, Arch, MoE
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.params import Param, layer_name, param_table

Ordering = dict[str, dict[str, np.ndarray]]
# Axes ranked inside another: the dimension that tells which of the rankings applies.
INSIDE = {'query_heads': 'kv_heads', 'mamba_heads': 'mamba_groups', 'expert_width': 'experts'}
# A ranking inside another is applied first, while its rows are still in the old order.
SEQUENCE = (*INSIDE, 'mamba_head_dim', 'kv_heads', 'experts', 'mlp', 'shared_width', 'embed')


def make_ordering(scores: dict[str, dict[str, np.ndarray]], arch: Arch, ranking: tuple[int, ...] = ()) -> Ordering:
    """The permutations that sort each axis by falling score; ties keep their old order."""
    ordering: Ordering = {}
    for group, axes in scores.items():
        ordering[group] = {}
        for axis, score in axes.items():
            mixer = _mixer_of(arch, group)
            if axis == 'experts' and isinstance(mixer, MoE) and mixer.groups > 1:
                score = score.reshape(mixer.groups, -1)
            ordering[group][axis] = np.argsort(-score, axis=-1, kind='stable').astype(np.int32)
    if ranking:
        ordering['layers'] = {'ranking': np.asarray(ranking, np.int32)}
    return ordering


def apply_ordering(
    params: dict[str, Any], ordering: Ordering, arch: Arch, old: Layout = FLAT, new: Layout = FLAT
) -> dict[str, Any]:
    """The parameters with every axis permuted into rank order, re-laid from layout `old` to `new`. Pure; runs under jit.

    Permutations speak of units in rank order of the old layout (for G = 1: as stored).
    """
    result: dict[str, dict[str, Any]] = {}
    for group, table in param_table(arch, old).items():
        perms = {**ordering.get('embedding', {}), **ordering.get(group, {})}
        mixer = _mixer_of(arch, group)
        result[group] = {name: _permute(params[group][name], param, perms, mixer, new) for name, param in table.items()}
    return result


def _permute(leaf: Any, param: Param, perms: dict[str, Any], mixer: Any, new: Layout) -> Any:
    axes, grouped = list(param.axes), isinstance(mixer, MoE) and mixer.groups > 1
    for axis in ('kv_heads', 'experts', 'mlp', 'shared_width'):
        if f'{axis}_blocks' in axes and not (axis == 'experts' and grouped):
            at = axes.index(f'{axis}_blocks')
            leaf = jnp.moveaxis(leaf, at, at + 1).reshape(*leaf.shape[:at], -1, *leaf.shape[at + 2 :])
            axes.pop(at)
    for axis in (*SEQUENCE, *(axis for axis in AXES if axis not in SEQUENCE)):
        if axis in perms and axis in axes:
            perm, at = jnp.asarray(perms[axis]), axes.index(axis)
            if axis == 'experts' and grouped:
                leaf = _take_inside(leaf, perm, axes.index('experts_blocks'), at)
            elif axis == 'expert_width' and grouped:
                block = axes.index('experts_blocks')
                merged = leaf.reshape(*leaf.shape[:block], -1, *leaf.shape[block + 2 :])
                leaf = _take_inside(merged, perm, block, at - 1).reshape(leaf.shape)
            elif axis in INSIDE:
                leaf = _take_inside(leaf, perm, axes.index(INSIDE[axis]), at)
            else:
                leaf = jnp.take(leaf, perm, axis=at)
    for axis in ('kv_heads', 'experts', 'mlp', 'shared_width'):
        if axis in axes and not (axis == 'experts' and grouped):
            at, blocks = axes.index(axis), new.blocks(axis, mixer)
            split = leaf.reshape(*leaf.shape[:at], leaf.shape[at] // blocks, blocks, *leaf.shape[at + 1 :])
            leaf = jnp.swapaxes(split, at, at + 1)
            axes.insert(at, f'{axis}_blocks')
    return leaf


def _take_inside(leaf: jax.Array, perm_RxN: jax.Array, rows_at: int, at: int) -> jax.Array:
    """Permutes dimension `at` by a permutation of its own for each index of dimension `rows_at`."""
    shape = [1] * leaf.ndim
    shape[rows_at], shape[at] = perm_RxN.shape
    perm = perm_RxN if rows_at < at else perm_RxN.T
    return jnp.take_along_axis(leaf, perm.reshape(shape), axis=at)


def _mixer_of(arch: Arch, group: str) -> Any:
    return next((mixer for i, mixer in enumerate(arch.mixers) if layer_name(i) == group), None)


def ordering_hash(ordering: Ordering) -> str:
    """A short digest of an ordering, for the manifest."""
    digest = hashlib.sha256()
    for group in sorted(ordering):
        for axis in sorted(ordering[group]):
            digest.update(f'{group}/{axis}'.encode() + np.ascontiguousarray(ordering[group][axis], np.int32).tobytes())
    return digest.hexdigest()[:16]
