"""How parameters are cut into chunks on disk: so small that any slice reads little more than its own bytes."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.checkpoint.quiet import quiet_orbax
from elastic_jax.model.params import Param, param_table

# Elements. A slice reads whole chunks, so on each axis it reads up to a chunk too much; 64 x 64 keeps that at a few percent,
# and what the index of the chunks takes under one percent of bfloat16.
TILE = 4096
# Axes that count things. A chunk holds one of each, so that these cost a slice nothing and the tile is left for two wide axes.
COUNTED = ('mlp_blocks', 'shared_width_blocks', 'experts_blocks', 'experts', 'kv_heads_blocks', 'kv_heads', 'query_heads',
           'mamba_groups', 'mamba_heads')  # fmt: skip


def params_save(params: Any, manifest: Manifest) -> ocp.args.PyTreeSave:
    """Saving the parameters of `manifest.arch` in chunks. Leaves: anything with a shape and a dtype."""
    table = param_table(manifest.arch, manifest.layout)
    chunked = lambda param, leaf: ocp.SaveArgs(chunk_byte_size=TILE * np.dtype(leaf.dtype).itemsize, shard_axes=_counted(param))
    return ocp.args.PyTreeSave(params, save_args=jax.tree.map(chunked, table, params))


def _counted(param: Param) -> tuple[int, ...]:
    """The dimensions of which a chunk holds one; none of a small parameter, whose chunks would be slivers."""
    counted = tuple(i for i, name in enumerate(param.axes) if name in COUNTED)
    wide = math.prod(size for i, size in enumerate(param.shape) if i not in counted)
    return counted if wide >= 8 * TILE else ()


quiet_orbax()
