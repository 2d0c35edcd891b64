"""How parameters are cut into chunks on disk: so small that any slice reads little more than its own bytes."""

from __future__ import annotations

import math
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.arrays import subchunking

from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.model.params import map_table, param_table

ARRAY_ITEMS = ('params', 'opt_state', 'router', 'ordering')
JSON_ITEMS = ('data', 'manifest')

# A slice reads whole chunks, so on each axis it reads up to a chunk's edge too much. Axes that count things have edges of one,
# and cost a slice nothing. Other elastic axes have edges of EDGE, or one part in SHARE of a wide axis.
EDGE, SHARE = 64, 64
COUNTED = ('mlp_blocks', 'shared_width_blocks', 'experts_blocks', 'experts', 'kv_heads_blocks', 'kv_heads', 'query_heads',
           'mamba_heads')  # fmt: skip
EDGES = {'embed': EDGE, 'mlp': EDGE, 'shared_width': EDGE, 'expert_width': EDGE, 'mamba_head_dim': 16}
EDGES |= dict.fromkeys(COUNTED, 1)
# Elements. Axes that are not elastic fill a chunk up to the first; every axis does up to the second, whatever that costs: chunks
# of 1 KB and less are kept inside the nodes of the index, which every write of a part reads and writes again.
FULL, SLIVER = 1 << 14, 1 << 10


def item_handlers(params: ocp.CheckpointHandler | None = None) -> dict[str, ocp.CheckpointHandler]:
    """Orbax's handler of every item that a checkpoint may have; `params`: another one than usual for the parameters.

    Nothing is compressed: weights shrink little (normal ones in bfloat16 to 0.78), for five times the work of writing them.
    """
    trees = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ARRAY_ITEMS}
    return trees | {name: ocp.JsonCheckpointHandler() for name in JSON_ITEMS} | ({'params': params} if params else {})


def params_save(params: Any, manifest: Manifest) -> ocp.args.PyTreeSave:
    """Saving the parameters of `manifest.arch` in chunks."""
    table = param_table(manifest.arch, manifest.layout)
    return ocp.args.PyTreeSave(params, save_args=map_table(lambda param: ocp.SaveArgs(shard_axes=Axes(param.axes)), table))


def chunk_shape(axes: tuple[str, ...], shape: tuple[int, ...], written: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the chunks of a parameter of which each device writes a part.

    Args:
      axes: of the parameter. shape: of all of it. written: of the part, which the chunks divide.
    """
    limit = lambda name, size: max(EDGE, size // SHARE) if EDGES.get(name) == EDGE else EDGES.get(name, 1)
    limits = [limit(name, size) for name, size in zip(axes, shape, strict=True)]
    chunk = [max(d for d in _divisors(size) if d <= edge) for size, edge in zip(written, limits, strict=True)]
    fixed = [i for i, name in enumerate(axes) if name not in EDGES]
    for dims, full in ((fixed, FULL), (range(len(axes)), SLIVER)):
        for i in reversed(dims):
            rest = math.prod(chunk) // chunk[i]
            chunk[i] = max(d for d in _divisors(written[i]) if d <= max(chunk[i], full // rest))
    return tuple(chunk)


def _divisors(size: int) -> list[int]:
    return [d for d in range(1, size + 1) if size % d == 0]


class Axes(tuple):
    """The names of a parameter's axes, in the place of Orbax's `shard_axes`."""


def _choose_chunk_shape(
    global_shape: tuple[int, ...], write_shape: tuple[int, ...], *args: Any, shard_axes: tuple[Any, ...] = (), **kwargs: Any
) -> tuple[int, ...]:
    if isinstance(shard_axes, Axes):
        return chunk_shape(shard_axes, global_shape, write_shape)
    return _ORBAX_CHOICE(global_shape, write_shape, *args, shard_axes=shard_axes, **kwargs)


# Orbax has no option for the shape of a chunk, only for its size. Its own choice cuts those axes to slivers that devices split.
_ORBAX_CHOICE = subchunking.choose_chunk_shape
subchunking.choose_chunk_shape = _choose_chunk_shape
