"""Import: a Hugging Face folder as a stream of our parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from elastic_jax.arch import Arch
from elastic_jax.errors import UserError
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.families import arch_of, family_of
from elastic_jax.hf.folder import ModelFolder
from elastic_jax.hf.name_map import (
    HFTensor,
    Piece,
    as_rows,
    block_order,
    copy_tiled,
    expert_index,
    hf_tensors,
    piece_axes,
    ranked_shape,
    sources,
)
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.params import Param, layer_name, leaves, param_table

READ_BYTES = 1 << 24


def import_params(folder: str | os.PathLike[str], layout: Layout = FLAT) -> Iterator[tuple[str, str, np.ndarray]]:
    """(group, name, leaf) of every parameter, one at a time, in the order of the table of parameters.

    Leaves have the dtype of the file, except those that must be float32. Everything is checked before the first leaf is read.
    Raises: UserError naming the file and the tensor that is missing, not expected, damaged or of another shape.
    """
    config = Config.read(Path(folder))
    arch = arch_of(config)
    tensors = hf_tensors(arch, family_of(config).names, layout.check(arch))
    files = ModelFolder(folder)
    try:
        files.check(tensors, arch.tied)
        parts = sources(tensors)
        for group, name, param in leaves(param_table(arch, layout)):
            yield group, name, _read_leaf(files, arch, group, param, parts[group, name])
    finally:
        files.close()


def _read_leaf(files: ModelFolder, arch: Arch, group: str, param: Param, parts: list[tuple[HFTensor, Piece]]) -> np.ndarray:
    dtypes = {files.dtype(tensor.name) for tensor, _ in parts}
    if len(dtypes) > 1:
        raise UserError(f'{files.folder}: {parts[0][0].name} and its like are of several dtypes; convert them to one')
    dtype = np.dtype(np.float32) if param.float32 else dtypes.pop()
    mixer = {layer_name(i): mixer for i, mixer in enumerate(arch.mixers)}.get(group)
    per_expert = parts[0][1].expert is not None
    leaf = np.empty(param.shape if per_expert else ranked_shape(param), dtype)
    for tensor, piece in parts:
        target = leaf[expert_index(param, mixer, piece.expert)] if per_expert else leaf
        rows = as_rows(target, piece_axes(param, piece))
        row_bytes = max(1, rows[:1].size) * dtype.itemsize
        step = max(1, READ_BYTES // row_bytes)
        for at in range(0, piece.rows, step):
            stop = min(piece.rows, at + step)
            block = files.read(tensor.name, piece.start + at, piece.start + stop)
            copy_tiled(rows[at:stop], block.reshape(rows[at:stop].shape))
    return leaf if per_expert else block_order(leaf, param, mixer)
