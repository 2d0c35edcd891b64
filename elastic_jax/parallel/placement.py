"""Where the arrays of a run live: how trees of parameters and batches get onto the mesh, and back to the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from elastic_jax.arch import Arch
from elastic_jax.layout import Layout
from elastic_jax.parallel.sharding import batch_sharding, data_parallelism, param_specs, tree_shardings


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and the model whose parameters are split over it. A mesh of one device is just that device."""

    mesh: Mesh
    parent: Arch
    layout: Layout

    @property
    def distributed(self) -> bool:
        return self.mesh.size > 1

    @cached_property
    def specs(self) -> dict[str, dict[str, PartitionSpec]]:
        return param_specs(self.parent, self.layout, self.mesh)

    @property
    def whole(self) -> jax.sharding.Sharding:
        """Of what is whole on every device."""
        if self.distributed:
            return NamedSharding(self.mesh, PartitionSpec())
        return SingleDeviceSharding(self.mesh.devices.flat[0])

    @property
    def batch_sharding(self) -> jax.sharding.Sharding:
        return batch_sharding(self.mesh) if self.distributed else self.whole

    def shardings(self, tree: Any) -> Any:
        """The sharding of every leaf of a tree that holds copies of the parameters; other leaves are whole everywhere."""
        if not self.distributed:
            return jax.tree.map(lambda leaf: self.whole, tree)
        return tree_shardings(tree, self.specs, self.mesh)

    def abstract(self, tree: Any) -> Any:
        """ShapeDtypeStructs with shardings, of a tree of arrays or of ShapeDtypeStructs."""
        describe = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.tree.map(describe, tree, self.shardings(tree))

    def make(self, build: Callable[..., Any], *args: Any) -> Any:
        """`build(*args)`, every leaf of it made on its own devices: nothing is ever whole on one of them."""
        shardings = self.shardings(jax.eval_shape(build, *args))
        return jax.jit(build, out_shardings=shardings)(*args)

    def put(self, tree: Any) -> Any:
        """A tree of host arrays, the same on every process, or of arrays placed otherwise, onto the mesh."""
        return jax.device_put(tree, self.shardings(tree))

    def on_host(self, tree: Any) -> Any:
        """Small arrays that may be split over any devices, whole in numpy on every process."""
        return jax.device_get(jax.jit(lambda t: t, out_shardings=jax.tree.map(lambda leaf: self.whole, tree))(tree))

    def rows(self, batch_size: int) -> tuple[tuple[int, int], ...]:
        """The (first, one past the last) ranges of a batch's rows that this process's devices hold, in order."""
        return _merged(self.batch_sharding.addressable_devices_indices_map((batch_size,)).values(), batch_size)

    def all_rows(self, batch_size: int) -> tuple[tuple[int, int], ...]:
        """The ranges of all processes, as `rows` gives each its own."""
        by_process: dict[int, list[Any]] = {}
        for device, index in self.batch_sharding.devices_indices_map((batch_size,)).items():
            by_process.setdefault(device.process_index, []).append(index)
        return tuple(sorted({own for held in by_process.values() for own in _merged(held, batch_size)}))

    def put_batch(self, batch: dict[str, np.ndarray], batch_size: int) -> dict[str, jax.Array]:
        """A batch from the rows of it that each process made."""
        if not self.distributed:
            return jax.device_put(batch, self.whole)
        place = jax.make_array_from_process_local_data
        return {key: place(self.batch_sharding, rows, (batch_size, *rows.shape[1:])) for key, rows in batch.items()}

    def put_whole_batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch that every process has all of; split by rows where they divide, else whole everywhere."""
        rows = len(next(iter(batch.values())))
        splits = self.distributed and rows % data_parallelism(self.mesh) == 0
        sharding = self.batch_sharding if splits else self.whole
        return {key: jax.make_array_from_callback(value.shape, sharding, value.__getitem__) for key, value in batch.items()}


def _merged(held: Iterable[Any], batch_size: int) -> tuple[tuple[int, int], ...]:
    """Ranges of rows from the indices of devices, with neighbours joined."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted({index[0].indices(batch_size)[:2] for index in held}):
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return tuple(merged)
