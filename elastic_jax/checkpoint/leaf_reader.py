"""Reading a slice leaf by leaf, for what is larger than memory: nothing is held but the leaf that was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from elastic_jax.arch import Arch
from elastic_jax.checkpoint.database import Database
from elastic_jax.checkpoint.memory import FreedMemory
from elastic_jax.checkpoint.stored import read_manifest, step_directory
from elastic_jax.errors import UserError, reason
from elastic_jax.model.params import leaves, param_table


class LeafReader:
    """`reader(group, name)` gives one parameter of `child`, read from its own bytes, as stored.

    Raises: UserError naming what does not nest in the checkpoint, is missing, damaged, or has another shape than declared.
    """

    def __init__(self, path: epath.PathLike, child: Arch):
        directory = step_directory(path)
        manifest = read_manifest(directory)
        problem = child.why_not_nested(manifest.arch)
        if problem:
            raise UserError(problem)
        self.where, self.freed = directory / 'params', FreedMemory()
        self.table = param_table(child, manifest.layout.check(child))
        full = param_table(manifest.arch, manifest.layout)
        try:
            database = Database(self.where)
        except (ValueError, OSError) as error:
            raise UserError(f'{self.where} cannot be read ({reason(error)}); use another checkpoint') from error
        opening = {(group, name): database.open(f'{group}.{name}') for group, name, _ in leaves(self.table)}
        self.stored: dict[tuple[str, str], Any] = {}
        for (group, name), future in opening.items():
            try:
                self.stored[group, name] = found = future.result()
            except (ValueError, OSError) as error:
                raise self._damaged(group, name, error) from error
            # A request larger than what is stored must not get this far.
            if tuple(found.shape) != full[group][name].shape:
                declared = full[group][name].shape
                raise UserError(
                    f'{directory}: parameter {group}/{name} has shape {tuple(found.shape)}, the manifest says {declared}; '
                    'use another checkpoint'
                )

    def __call__(
        self, group: str, name: str, index: tuple[slice, ...] | None = None, dtype: np.dtype | None = None
    ) -> np.ndarray:
        """The parameter, or the part of it that `index` cuts; cast to `dtype` on its way."""
        corner: Any = tuple(slice(size) for size in self.table[group][name].shape)
        stored = self.stored[group, name]
        try:
            array = (stored if dtype is None else ts.cast(stored, dtype))[corner]
            read = (array if index is None else array[index]).read().result()
        except (ValueError, OSError) as error:
            raise self._damaged(group, name, error) from error
        self.freed.passed(read.nbytes)
        return read

    def _damaged(self, group: str, name: str, error: Exception) -> UserError:
        return UserError(f'{self.where}: {group}/{name} is missing or damaged ({reason(error)}); use another checkpoint')

    def edge(self, group: str, name: str, axis: int) -> int:
        """How long the chunks of a parameter are along an axis: parts that are cut between them read nothing twice."""
        return self.stored[group, name].chunk_layout.read_chunk.shape[axis]

    def dtype(self, group: str, name: str) -> np.dtype:
        """The dtype that a parameter is stored in."""
        return np.dtype(self.stored[group, name].dtype.numpy_dtype)
