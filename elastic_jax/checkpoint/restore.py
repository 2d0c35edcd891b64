"""Reading checkpoints: the manifest, and any slice of the parameters from its own bytes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath

from elastic_jax.arch import Arch
from elastic_jax.checkpoint.leaf_reader import LeafReader
from elastic_jax.checkpoint.stored import read_manifest, step_directory
from elastic_jax.checkpoint.tree_reader import read_sharded
from elastic_jax.model.params import leaves, param_dtype

__all__ = ['read_manifest', 'restore_slice', 'step_directory']


def restore_slice(path: epath.PathLike, child: Arch, shardings: Any = None, dtype: Any = None) -> dict[str, Any]:
    """The parameters of `child`, read from the leading corner of each stored array, one after the other.

    Args:
      path: a workdir or a step. child: any Arch that nests in the checkpoint's parent and respects its layout.
      shardings: group -> name -> Sharding; without it everything goes to the first device.
      dtype: of the parameters (those that must stay float32 do); default: as stored.
    Raises: UserError naming what does not nest, is missing or damaged, or has another shape than the manifest says.
    """
    read = LeafReader(path, child)
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: dict[str, dict[str, Any]] = {group: {} for group in read.table}
    for group, name, param in leaves(read.table):
        own_dtype = np.dtype(read.dtype(group, name) if dtype is None else param_dtype(param, dtype))
        sharding = one_device if shardings is None else shardings[group][name]
        own = lambda index, leaf=(group, name), dtype=own_dtype: read(*leaf, index, dtype)
        params[group][name] = read_sharded(param.shape, sharding, own)
    return params
