"""Saving parameters that are not in memory: a leaf is read only when its turn to be written comes."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from elastic_jax.checkpoint.chunks import params_save
from elastic_jax.checkpoint.database import INDEX_NODE
from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.checkpoint.memory import FreedMemory
from elastic_jax.errors import WorkError

# Bytes of leaves that are read and written at the same time; a larger leaf is alone.
IN_FLIGHT = 1 << 26


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
    """An array that `load` makes; it may stand for an array in any tree that Orbax saves."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        return len(self.shape)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of numpy arrays, a few leaves at a time. On disk there is no difference."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.stopping, self.idle, self.freed = False, threading.Event(), FreedMemory()
        self.idle.set()

    async def _background_serialize(
        self, values: Sequence[LazyLeaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> None:
        serialize, freed, used = super()._background_serialize, asyncio.Condition(), 0

        async def write(value: LazyLeaf, info: Any, arg: Any) -> None:
            nonlocal used
            need = min(value.nbytes, IN_FLIGHT)
            async with freed:
                await freed.wait_for(lambda: used + need <= IN_FLIGHT)
                used += need
            if self.stopping:
                raise OSError('stopped')
            await serialize([await asyncio.to_thread(value.load)], [info], [arg])
            self.freed.passed(value.nbytes)
            async with freed:
                used -= need
                freed.notify_all()

        self.idle.clear()
        try:
            async with asyncio.TaskGroup() as tasks:
                for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                    tasks.create_task(write(value, info, arg))
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        finally:
            self.idle.set()

    async def _open_and_write(self, value: np.ndarray, spec: dict[str, Any], context: Any) -> None:
        # Every leaf commits the index nodes that it touched. Orbax's node is the whole index.
        spec['kvstore']['config'] |= {'max_decoded_node_bytes': INDEX_NODE}
        await super()._open_and_write(value, spec, context)

    def stop(self) -> None:
        """Returns when no leaf is being written any more."""
        self.stopping = True
        self.idle.wait()


def save_lazily(workdir: epath.PathLike, params: Any, manifest: Manifest) -> None:
    """Writes step 0 of a new workdir from a tree of LazyLeaf.

    Raises: WorkError when it cannot be written; what was begun is then removed. Errors of `load` pass through.
    """
    root = epath.Path(workdir).resolve() / 'checkpoints'  # Orbax wants absolute paths
    arrays = _LazyHandler()
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, ocp.type_handlers.ArrayHandler()), (LazyLeaf, arrays))
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        data=ocp.JsonCheckpointHandler(),
        manifest=ocp.JsonCheckpointHandler(),
    )
    items = ocp.args.Composite(
        params=params_save(params, manifest), data=ocp.args.JsonSave({}), manifest=ocp.args.JsonSave(manifest.to_json())
    )
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(root / '0', args=items)
    except (OSError, ValueError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise WorkError(f'writing {root} failed ({line}); free some space or take another --checkpoint') from error
    finally:
        arrays.stop()  # another item's failure does not stop it
        if root.exists() and not (root / '0').exists():
            root.rmtree()
