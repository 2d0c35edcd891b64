"""Reading a slice leaf by leaf, for what is larger than memory: nothing is held but the leaf that was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from elastic_jax.arch import Arch
from elastic_jax.checkpoint.restore import read_manifest, step_directory, stored_shapes
from elastic_jax.errors import UserError
from elastic_jax.model.params import param_table


class LeafReader:
    """`reader(group, name)` gives one parameter of `child`, read from its own bytes, as stored.

    Raises: UserError naming what does not nest in the checkpoint, is missing or damaged.
    """

    def __init__(self, path: epath.PathLike, child: Arch):
        directory = step_directory(path)
        manifest = read_manifest(directory)
        problem = child.why_not_nested(manifest.arch)
        if problem:
            raise UserError(problem)
        self.where = directory / 'params'
        where = str(self.where)
        self.base = where if '://' in where else f'file://{where}'
        self.stored = stored_shapes(directory, manifest.arch, manifest.layout)
        self.table = param_table(child, manifest.layout.check(child))
        self.context = ts.Context({'cache_pool': {'total_bytes_limit': 0}})

    def __call__(self, group: str, name: str) -> np.ndarray:
        # Orbax keeps all arrays of an item in one OCDBT database, each as zarr under its dotted path.
        kvstore = {'driver': 'ocdbt', 'base': self.base, 'path': f'{group}.{name}/'}
        corner: Any = tuple(slice(size) for size in self.table[group][name].shape)
        try:
            array = ts.open({'driver': 'zarr', 'kvstore': kvstore}, open=True, context=self.context).result()
            return array[corner].read().result()
        except (ValueError, OSError) as error:
            line = str(error).splitlines()[0][:200]
            raise UserError(f'{self.where}: {group}/{name} cannot be read ({line}); use another checkpoint') from error

    def dtype(self, group: str, name: str) -> np.dtype:
        """The dtype that a parameter is stored in."""
        return np.dtype(self.stored[group][name].dtype)
