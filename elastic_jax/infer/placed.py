"""Where the rows of a batch live when the parameters are split over a mesh: by the rules that place parameters and batches.

Rows are split over the axes that split data, where they divide; keys, values and Mamba heads over the axes that split the blocks
that made them. One number for each row is whole everywhere, so that every process can read it.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from elastic_jax.infer.resident import Weights
from elastic_jax.model.attention import KVCache
from elastic_jax.model.collectives import Axes
from elastic_jax.model.mamba import MambaCache
from elastic_jax.parallel.sharding import shards


def everywhere(tree: Any, weights: Weights) -> Any:
    """The arrays, whole on every device: what the host reads. For use inside a jitted program."""
    return tree if weights.mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(weights.mesh, PartitionSpec()))


def place_rows(tree: Any, weights: Weights) -> Any:
    """The tree of arrays [B, ...] and caches, constrained to its place; for use inside a jitted program."""
    if weights.mesh is None:
        return tree
    split = shards(weights.arch, weights.layout, weights.mesh)
    rows = next(leaf.shape[0] for leaf in jax.tree.leaves(tree))
    parts = math.prod(weights.mesh.shape[axis] for axis in split.data)
    batch: Axes = split.data if rows % parts == 0 else ()

    def put(leaf: jax.Array, axes: Axes, dim: int) -> jax.Array:
        entries = {0: batch, dim: axes if dim else batch}
        spec = PartitionSpec(*(entries.get(i) or None for i in range(max(entries) + 1)))
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(weights.mesh, spec))

    def place(node: Any) -> Any:
        if isinstance(node, KVCache):
            return jax.tree.map(lambda leaf: put(leaf, split.of('kv_heads_blocks'), 1), node)
        if isinstance(node, MambaCache):
            groups = split.of('mamba_groups')
            windows = [put(window, groups, 2) for window in node[:-1]]
            return MambaCache(*windows, put(node.state_BxGxMxPxN, groups, 1))
        return put(node, (), 0) if node.ndim > 1 else everywhere(node, weights)

    return jax.tree.map(place, tree, is_leaf=lambda node: isinstance(node, KVCache | MambaCache))
