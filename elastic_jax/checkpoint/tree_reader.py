"""Reading a tree of arrays, every process its own parts, with no word between them: a damaged file is nobody's deadlock."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from elastic_jax.checkpoint.database import Database
from elastic_jax.errors import UserError, reason


def read_tree(directory: epath.Path, abstract: Any = None) -> Any:
    """A tree of arrays as saved, in numpy, or as the ShapeDtypeStructs of `abstract` say: dtype, and sharding if they have one.

    Raises: UserError naming the item and the leaf that is missing, damaged or of another shape.
    """
    try:
        stored = ocp.PyTreeCheckpointHandler().metadata(directory).tree
        database = Database(directory)
    except Exception as error:  # Orbax raises just that for metadata it cannot read
        raise _damaged(directory, error) from error
    shapes = {_dotted(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored) if abstract is None else abstract
    named, treedef = jax.tree_util.tree_flatten_with_path(wanted)
    for path, leaf in named:
        name = _dotted(path)
        if name not in shapes:
            raise UserError(f'{directory} lacks {name}; use another checkpoint')
        if shapes[name] != tuple(leaf.shape):
            raise UserError(f'{directory}: {name} has shape {shapes[name]}, expected {leaf.shape}; use another checkpoint')
    try:
        opening = [database.open(_dotted(path)) for path, _ in named]
        return treedef.unflatten(_read(leaf, store.result()) for (_, leaf), store in zip(named, opening, strict=True))
    except (ValueError, OSError) as error:
        raise _damaged(directory, error) from error


def _read(leaf: Any, store: Any) -> Any:
    read = lambda index: store[index].read().result().astype(leaf.dtype, copy=False)
    sharding = getattr(leaf, 'sharding', None)
    return read(()) if sharding is None else read_sharded(leaf.shape, sharding, read)


def read_sharded(shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Any) -> jax.Array:
    """An array whose devices each read their own part, `read(index)`; replicas read it once."""
    parts: dict[Any, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(cut.indices(size) for cut, size in zip(index, shape, strict=True))
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(tuple(shape), sharding, part)


def _damaged(directory: epath.Path, error: Exception) -> UserError:
    return UserError(f'{directory} is damaged or does not fit ({reason(error)}); use another checkpoint')


def _dotted(path: tuple[Any, ...]) -> str:
    """The name under which Orbax stores a leaf."""
    return '.'.join(_key(part) for part in path)


def _key(part: Any) -> str:
    for attribute in ('key', 'name', 'idx'):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)
