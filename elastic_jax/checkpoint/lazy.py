"""Saving parameters that are not in memory: a part of a leaf is only there while it is being written."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from elastic_jax.checkpoint.chunks import item_handlers, params_save
from elastic_jax.checkpoint.database import INDEX_NODE
from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.checkpoint.memory import FreedMemory
from elastic_jax.errors import WorkError, reason

Index = tuple[slice, ...]

# Bytes of a part. Every part that is written rewrites the index nodes that it touches, so smaller ones would cost disk space.
PART = 1 << 27
# Bytes of parts that are read and written at the same time; a larger part is alone.
IN_FLIGHT = 3 << 26


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
    """An array that `load` makes, whole or the part that an index cuts along `axis`.

    It may stand for an array in any tree that Orbax saves.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[Index], np.ndarray]
    axis: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)


def cuts(shape: Sequence[int], axis: int, edge: int, unit_bytes: int, limit: int) -> Iterator[Index]:
    """Indices that cut an array along `axis` into parts of at most `limit` bytes, or one edge of a chunk, between its chunks.

    Args:
      edge: of the chunks along `axis`. unit_bytes: of all that has one index along `axis`.
    """
    step = max(1, limit // max(1, unit_bytes * edge)) * edge
    for start in range(0, shape[axis], step):
        yield tuple(slice(start, min(size, start + step)) if dim == axis else slice(0, size) for dim, size in enumerate(shape))


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, a few parts at a time. On disk there is no difference."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.stopping, self.idle, self.freed = False, threading.Event(), FreedMemory()
        self.room, self.used = asyncio.Condition(), 0
        self.idle.set()

    async def _background_serialize(
        self, values: Sequence[LazyLeaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> None:
        serialize = super()._background_serialize
        self.idle.clear()
        try:
            async with asyncio.TaskGroup() as tasks:
                for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                    tasks.create_task(serialize([value], [info], [arg]))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            self.idle.set()

    async def _open_and_write(self, value: LazyLeaf, spec: dict[str, Any], context: Any) -> None:
        # Every part commits the index nodes that it touched. Orbax's node is the whole index.
        spec['kvstore']['config'] |= {'max_decoded_node_bytes': INDEX_NODE}
        store = await ts.open(ts.Spec(spec), create=True, open=True, context=context)
        edge, length = store.chunk_layout.write_chunk.shape[value.axis], value.shape[value.axis]
        for index in cuts(value.shape, value.axis, edge, value.nbytes // length, PART):
            part = index[value.axis]
            nbytes = value.nbytes // length * (part.stop - part.start)
            need = min(nbytes, IN_FLIGHT)
            async with self.room:
                await self.room.wait_for(lambda need=need: self.used + need <= IN_FLIGHT)
                self.used += need
            if self.stopping:
                raise OSError('stopped')
            array = await asyncio.to_thread(value.load, index)
            await store[index].write(array, can_reference_source_data_indefinitely=True)
            del array
            self.freed.passed(nbytes)
            async with self.room:
                self.used -= need
                self.room.notify_all()

    def stop(self) -> None:
        """Returns when no part is being written any more."""
        self.stopping = True
        self.idle.wait()


def save_lazily(workdir: epath.PathLike, params: Any, manifest: Manifest) -> None:
    """Writes step 0 of a new workdir from a tree of LazyLeaf.

    Raises: WorkError when it cannot be written; what was begun is then removed. Errors of `load` pass through.
    """
    root = epath.Path(workdir).resolve() / 'checkpoints'  # Orbax wants absolute paths
    arrays = _LazyHandler()
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, ocp.type_handlers.ArrayHandler()), (LazyLeaf, arrays))
    trees = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    items = ocp.args.Composite(
        params=params_save(params, manifest), data=ocp.args.JsonSave({}), manifest=ocp.args.JsonSave(manifest.to_json())
    )
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**item_handlers(trees))) as checkpointer:
            checkpointer.save(root / '0', args=items)
    except (OSError, ValueError) as error:
        raise WorkError(f'writing {root} failed ({reason(error)}); free some space or take another --checkpoint') from error
    finally:
        arrays.stop()  # another item's failure does not stop it
        if root.exists() and not (root / '0').exists():
            root.rmtree()
