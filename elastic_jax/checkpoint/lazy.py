"""Saving parameters that are not in memory: a part of a leaf is only there while it is being written."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
import time
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
from elastic_jax.checkpoint.stored import keep_files
from elastic_jax.data.tokenizers import TOKENIZER_FILES
from elastic_jax.errors import UserError, WorkError, reason

Index = tuple[slice, ...]

# Bytes of a part. Every part that is written rewrites the index nodes that it touches; at this size that is 0.01 % of the disk.
PART = 1 << 25
# Bytes of parts that are read and written at the same time, so that the one overlaps the other; a larger part is alone.
IN_FLIGHT = 1 << 27
REMOVALS = 100  # attempts


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
        serialize, failures = super()._background_serialize, []

        async def write(value: LazyLeaf, info: Any, arg: Any) -> None:
            try:
                await serialize([value], [info], [arg])
            except Exception as error:
                self.stopping = True
                failures.append(error)

        self.idle.clear()
        try:
            # None is cancelled when one fails: tensorstore would go on writing behind.
            args = args or [ocp.SaveArgs()] * len(values)
            await asyncio.gather(*(write(*each) for each in zip(values, infos, args, strict=True)))
        finally:
            self.idle.set()
        if failures:
            raise failures[0]

    async def _open_and_write(self, value: LazyLeaf, spec: dict[str, Any], context: Any) -> None:
        self._go_on()
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
            try:
                self._go_on()
                array = await asyncio.to_thread(value.load, index)
                await store[index].write(array, can_reference_source_data_indefinitely=True)
                del array
                self.freed.passed(nbytes)
            finally:
                async with self.room:
                    self.used -= need
                    self.room.notify_all()

    def _go_on(self) -> None:
        if self.stopping:
            raise OSError('stopped')

    def stop(self) -> None:
        """Returns when no part is being written any more."""
        self.stopping = True
        self.idle.wait()


def save_lazily(workdir: epath.PathLike, params: Any, manifest: Manifest, tokenizer: epath.PathLike | None = None) -> None:
    """Writes step 0 of a new workdir from a tree of LazyLeaf; first, beside it, the files of the folder `tokenizer`.

    Raises: UserError when the workdir holds another tokenizer; WorkError when it cannot be written. Errors of `load` pass
      through. Either way what was begun is removed, and nothing else.
    """
    workdir = epath.Path(workdir).resolve()  # Orbax wants absolute paths
    root, beside = workdir / 'checkpoints', workdir / 'tokenizer'
    if tokenizer:
        _refuse_another(beside, epath.Path(tokenizer))
    before = set(_entries(workdir))
    arrays = _LazyHandler()
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, ocp.type_handlers.ArrayHandler()), (LazyLeaf, arrays))
    trees = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    items = ocp.args.Composite(
        params=params_save(params, manifest), data=ocp.args.JsonSave({}), manifest=ocp.args.JsonSave(manifest.to_json())
    )
    try:
        if tokenizer:
            keep_files(tokenizer, beside, TOKENIZER_FILES)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**item_handlers(trees))) as checkpointer:
            checkpointer.save(root / '0', args=items)
    except (OSError, ValueError) as error:
        raise WorkError(
            f'writing {workdir} failed ({reason(error)}); nothing was left behind, so free some space or write elsewhere'
        ) from error
    finally:
        arrays.stop()  # another item's failure does not stop it
        if not (root / '0').exists():
            for path in _entries(workdir):
                if path not in before:
                    _remove(path)


def _refuse_another(folder: epath.Path, tokenizer: epath.Path) -> None:
    """Every slice would carry the files of another tokenizer along. Those of this one may be there from a killed attempt."""
    for path in folder.iterdir() if folder.is_dir() else ():
        own = tokenizer / path.name
        if path.name not in TOKENIZER_FILES or not own.is_file() or own.read_bytes() != path.read_bytes():
            raise UserError(f'{path} is none of the files of the tokenizer in {tokenizer}; remove it, or take another folder')


def _entries(workdir: epath.Path) -> list[epath.Path]:
    """The folder and what is in it and in its folders, as far as `save_lazily` writes there; outer ones first."""
    folders = [folder for folder in (workdir, workdir / 'checkpoints', workdir / 'tokenizer') if folder.is_dir()]
    return folders + [path for folder in folders[1:] for path in folder.iterdir()]


def _remove(path: epath.Path) -> None:
    """Removes a file, or a folder in which a file that failed may still be coming or going."""
    for _ in range(REMOVALS):
        try:
            path.rmtree() if path.is_dir() else path.unlink()
        except FileNotFoundError:
            if not path.exists():
                return
        except OSError:
            time.sleep(0.05)
