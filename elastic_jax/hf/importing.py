"""Import: a Hugging Face folder as a stream of our parameters, and as an elastic checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from etils import epath

from elastic_jax.arch import Arch, Mixer
from elastic_jax.checkpoint.lazy import Index, LazyLeaf, save_lazily
from elastic_jax.checkpoint.manifest import Budget, Manifest
from elastic_jax.cost import cost_of
from elastic_jax.data.tokenizers import ByteTokenizer
from elastic_jax.errors import UserError
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.families import arch_of, family_of
from elastic_jax.hf.folder import ModelFolder
from elastic_jax.hf.hub import resolve
from elastic_jax.hf.name_map import (
    BLOCK_BYTES,
    HFTensor,
    Piece,
    as_rows,
    copy_rows,
    cut_axis,
    expert_index,
    hf_tensors,
    part_of,
    sources,
)
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.params import Param, layer_name, leaves, param_table
from elastic_jax.nest.relayout import block_order, ranked_shape


def import_params(folder: str | os.PathLike[str], layout: Layout = FLAT) -> Iterator[tuple[str, str, np.ndarray]]:
    """(group, name, leaf) of every parameter, one at a time, in the order of the table of parameters.

    Leaves have the dtype of the file, except those that must be float32. Everything is checked before the first leaf is read.
    Raises: UserError naming the file and the tensor that is missing, not expected, damaged or of another shape.
    """
    config = Config.read(Path(folder))
    files = ModelFolder(folder)
    try:
        tree = lazy_params(files, config, layout)
        for group, named in tree.items():
            for name, leaf in named.items():
                yield group, name, leaf.load(tuple(slice(0, size) for size in leaf.shape))
    finally:
        files.close()


def import_checkpoint(dir_or_id: str | os.PathLike[str], checkpoint: epath.PathLike, metric_context: int = 4096) -> Arch:
    """Writes an elastic checkpoint with the one budget `full` from a Hugging Face model, one tensor at a time.

    Args:
      dir_or_id: a folder, or a model id of the Hugging Face hub. checkpoint: a workdir without checkpoints.
      metric_context: tokens of context that the costs in the manifest are for.
    Tokenizer files are kept in `checkpoint/tokenizer`. Returns the imported Arch.
    Raises: UserError when the model is not supported or damaged, or the workdir is taken; WorkError when it cannot be written.
    """
    workdir = epath.Path(checkpoint).resolve()
    root = workdir / 'checkpoints'
    if root.exists() and any(entry.name.isdigit() for entry in root.iterdir()):  # what a killed import left is no checkpoint
        raise UserError(f'{workdir} holds checkpoints already; take another --checkpoint')
    folder = resolve(dir_or_id)
    config = Config.read(folder)
    arch = arch_of(config)
    files = ModelFolder(folder)
    try:
        tree = lazy_params(files, config, FLAT)
        largest = max((leaf for named in tree.values() for leaf in named.values()), key=lambda leaf: leaf.nbytes)
        manifest = Manifest(
            arch=arch,
            layout=FLAT,
            budgets={'full': Budget(arch, cost_of(arch, metric_context).to_json())},
            step=0,
            stage='imported',
            stage_step=0,
            rng=[],
            dtypes={'params': str(largest.dtype), 'compute': 'float32'},
            tokenizer=_tokenizer_spec(folder, workdir),
            hf_config={**config.data, '_name_or_path': folder.name if folder == Path(dir_or_id) else str(dir_or_id)},
            data_fingerprint='',
            ordering_hash='',
            experiment='import',
        )
        save_lazily(workdir, tree, manifest, tokenizer=folder)
    finally:
        files.close()
    return arch


def _tokenizer_spec(folder: Path, workdir: epath.Path) -> dict[str, str]:
    """The spec of the tokenizer whose files will be kept in the workdir; without tokenizer.json text is bytes."""
    if (folder / 'tokenizer.json').is_file():
        return {'kind': 'hf', 'folder': str(workdir / 'tokenizer')}
    said = 'text will be read as bytes here, and what tokenizer files there are go along'
    print(f'elastic: {folder} has no tokenizer.json, so {said}', file=sys.stderr)
    return dict(ByteTokenizer.spec)


def lazy_params(files: ModelFolder, config: Config, layout: Layout) -> dict[str, dict[str, LazyLeaf]]:
    """The parameters, read when they are asked for. Raises UserError when the files do not hold what config.json says."""
    arch = arch_of(config)
    tensors = hf_tensors(arch, family_of(config).names, layout.check(arch))
    files.check(tensors, arch.tied)
    parts = sources(tensors)
    table = param_table(arch, layout)
    mixers = {layer_name(i): mixer for i, mixer in enumerate(arch.mixers)}
    tree: dict[str, dict[str, LazyLeaf]] = {group: {} for group in table}
    for group, name, param in leaves(table):
        own = parts[group, name]
        dtypes = {files.dtype(tensor.name) for tensor, _ in own}
        if len(dtypes) > 1:
            raise UserError(f'{files.folder}: {own[0][0].name} and its like are of several dtypes; convert them to one')
        dtype = np.dtype(np.float32) if param.float32 else dtypes.pop()
        axis = cut_axis(param, mixers.get(group), own[0][1].expert is not None)
        load = partial(_read_part, files, param, mixers.get(group), axis, own, dtype)
        tree[group][name] = LazyLeaf(param.shape, dtype, load, axis)
    return tree


def _read_part(
    files: ModelFolder,
    param: Param,
    mixer: Mixer | None,
    axis: int,
    sources: list[tuple[HFTensor, Piece]],
    dtype: np.dtype,
    index: Index,
) -> np.ndarray:
    """The part of a leaf that `index` cuts along `axis`."""
    part, cut = part_of(param, index), index[axis]
    per_expert = sources[0][1].expert is not None
    leaf = np.empty(part.shape if per_expert else ranked_shape(part), dtype)
    for tensor, piece in sources:
        unit = piece.rows // param.shape[axis]
        target, first, count = leaf, unit * cut.start, unit * part.shape[axis]
        if per_expert:
            block, inner = expert_index(param, mixer, piece.expert)
            if not cut.start <= inner < cut.stop:
                continue
            target, first, count = leaf[block, inner - cut.start], 0, piece.rows
        rows = as_rows(target, param, piece)
        step = max(1, BLOCK_BYTES // max(1, rows[:1].nbytes))
        for at in range(0, count, step):
            stop = min(count, at + step)
            read = files.read(tensor.name, piece.start + first + at, piece.start + first + stop)
            copy_rows(rows[at:stop], read.reshape(rows[at:stop].shape))
    return leaf if per_expert else block_order(leaf, part, mixer)
