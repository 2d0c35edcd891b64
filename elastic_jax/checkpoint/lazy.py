"""Saving parameters that are not in memory: each leaf is read only when its turn to be written comes."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from elastic_jax.checkpoint.manager import _tree_save
from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.errors import WorkError


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
    """Orbax's handler of numpy arrays, one leaf at a time. On disk there is no difference."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self.stopping, self.idle = False, threading.Event()
        self.idle.set()

    async def _background_serialize(
        self, values: Sequence[LazyLeaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> None:
        self.idle.clear()
        try:
            for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
                if self.stopping:
                    raise OSError('stopped')
                await super()._background_serialize([value.load()], [info], [arg])
        finally:
            self.idle.set()

    def stop(self) -> None:
        """Returns when no leaf is being written any more."""
        self.stopping = True
        self.idle.wait()


def save_lazily(workdir: epath.PathLike, params: Any, manifest: Manifest) -> None:
    """Writes step 0 of a new workdir from a tree of LazyLeaf.

    Raises: WorkError when it cannot be written; what was begun is then removed. Errors of `load` pass through.
    """
    root = epath.Path(workdir) / 'checkpoints'
    arrays = _LazyHandler()
    registry = ocp.type_handlers.create_type_handler_registry((LazyLeaf, arrays))
    handler = ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        data=ocp.JsonCheckpointHandler(),
        manifest=ocp.JsonCheckpointHandler(),
    )
    items = ocp.args.Composite(
        params=_tree_save(params), data=ocp.args.JsonSave({}), manifest=ocp.args.JsonSave(manifest.to_json())
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
