"""Export: any slice as a folder that plain transformers loads and whose config vLLM reads."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from elastic_jax.arch import Arch, Mixer, MoE
from elastic_jax.checkpoint.lazy import Index, cuts
from elastic_jax.checkpoint.stored import keep_files
from elastic_jax.data.tokenizers import TOKENIZER_FILES
from elastic_jax.errors import UserError, WorkError
from elastic_jax.hf.card import model_card
from elastic_jax.hf.families import family_for
from elastic_jax.hf.folder import INDEX
from elastic_jax.hf.name_map import (
    BLOCK_BYTES,
    HFTensor,
    Piece,
    as_rows,
    cut_axis,
    expert_index,
    hf_tensors,
    part_of,
    row_major,
    tied_copy,
)
from elastic_jax.hf.safetensors import SafetensorsWriter
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.params import Param, Table, layer_name, param_table
from elastic_jax.nest.relayout import rank_order

LeafReader = Callable[[str, str, Index], np.ndarray]
Edge = Callable[[str, str, int], int]
DtypeOf = Callable[[str, str], np.dtype]
DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16), 'float16': np.dtype(np.float16)}
PART_BYTES = 1 << 25  # of a leaf that is read at a time
AHEAD = 2  # parts that are read before they are needed
# Of a parent's config.json: code that must not run, how it was quantised, and where it came from.
NOT_KEPT = ('auto_map', 'experts_implementation', 'quantization_config', '_name_or_path', 'torch_dtype', 'transformers_version')


class _Part(NamedTuple):
    """What an index cuts from a leaf: rows that follow each other in the tensor of `piece`, or one expert."""

    piece: Piece
    param: Param
    mixer: Mixer | None
    index: Index


def export_folder(
    out: str | os.PathLike[str],
    arch: Arch,
    leaf_reader: LeafReader,
    *,
    edge: Edge = lambda group, name, axis: 1,
    layout: Layout = FLAT,
    dtype: str = 'bfloat16',
    dtype_of: DtypeOf | None = None,
    hf_config: Mapping[str, Any] | None = None,
    tokenizer_folder: str | os.PathLike[str] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    context: int | None = None,
    card: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes safetensors (sharded past a size), config.json, generation_config.json, tokenizer files and a model card.

    Leaves that must be float32 stay so. Everything is written beside `out` and renamed at the end.

    Args:
      arch: of the slice; its dropped blocks are left out. leaf_reader: (group, name, index) -> the part of the slice's leaf in
        `layout`. edge: (group, name, axis) -> of the chunks that it is stored in.
      dtype: what config.json names. dtype_of: (group, name) -> that of a leaf in the files (default: `dtype`).
      hf_config: config.json of the imported parent; what the slice does not change is kept from it.
      eos_token_id: what ends a text; context: tokens that it was trained on at once. Where there is no `hf_config` to name them.
      card: facts for the model card (see `card.model_card`).
    Raises: UserError when the family cannot hold the slice (offering the nearest it can) or `out` is not empty; WorkError
      when the disk is full.
    """
    if dtype not in DTYPES:
        raise UserError(f'dtype {dtype!r} is not supported; take one of {", ".join(DTYPES)}')
    out = Path(out).resolve()  # '.' and 'x/..' have no name
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f'{out} exists and is not an empty folder; take another --out')
    family = family_for(arch, hf_config)
    config = _config(arch, family.to_config(arch), family, dtype, hf_config, eos_token_id, context)
    tensors = tied_copy(arch, family.names, layout) + hf_tensors(arch, family.names, layout)

    partial = out.with_name(f'{out.name}.partial-{os.getpid()}')
    try:
        partial.mkdir(parents=True)
        own = dtype_of or (lambda group, name: DTYPES[dtype])
        _write_tensors(partial, tensors, arch, leaf_reader, edge, layout, own, max_shard_bytes)
        _write_json(partial / 'config.json', config)
        generation = {key: config.get(key) for key in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
        _write_json(partial / 'generation_config.json', {key: value for key, value in generation.items() if value is not None})
        if tokenizer_folder:
            keep_files(tokenizer_folder, partial, TOKENIZER_FILES)
        (partial / 'README.md').write_text(model_card(arch, family.model_type, dtype, card or {}))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        reason = 'no space is left' if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise WorkError(
            f'writing {out} failed: {reason}; nothing was left behind, so free some space or take another --out'
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _config(
    arch: Arch,
    entries: dict[str, Any],
    family: Any,
    dtype: str,
    parent: Mapping[str, Any] | None,
    eos_token_id: int | Sequence[int] | None,
    context: int | None,
) -> dict[str, Any]:
    if parent and parent.get('model_type') == family.model_type:
        kept = {key: value for key, value in parent.items() if key not in (*NOT_KEPT, *family.replaced)}
    else:
        # Families have token ids of their own by default, which would be wrong here.
        kept = {'bos_token_id': None, 'eos_token_id': eos_token_id, 'pad_token_id': None}
        if context:
            kept['max_position_embeddings'] = context
    for mixer in arch.mixers:
        unaligned = isinstance(mixer, MoE) and any(
            width * DTYPES[dtype].itemsize % 16 for width in (arch.embed, mixer.expert_width)
        )
        if unaligned:  # torch's grouped matmul, the default of transformers 5, refuses such rows
            kept['experts_implementation'] = 'eager'
    return {
        'architectures': [family.architecture],
        'model_type': family.model_type,
        **{key: value for key, value in kept.items() if key not in ('architectures', 'model_type')},
        **entries,
        'dtype': dtype,
        'torch_dtype': dtype,  # what transformers 4 and vLLM read
    }


def _write_tensors(
    folder: Path,
    tensors: list[HFTensor],
    arch: Arch,
    leaf_reader: LeafReader,
    edge: Edge,
    layout: Layout,
    dtype_of: DtypeOf,
    max_shard_bytes: int,
) -> None:
    table = param_table(arch, layout)
    specs = [(tensor, _file_dtype(tensor, table, dtype_of)) for tensor in tensors]
    shards, sizes = [[]], [0]
    for tensor, tensor_dtype in specs:
        size = math.prod(tensor.shape) * tensor_dtype.itemsize
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append((tensor, tensor_dtype))
        sizes[-1] += size
    count = len(shards)
    names = ['model.safetensors'] if count == 1 else [f'model-{i + 1:05d}-of-{count:05d}.safetensors' for i in range(count)]
    with ThreadPoolExecutor(1) as reading:
        parts = _read_ahead([part for tensor in tensors for part in _parts(tensor, arch, table, edge)], leaf_reader, reading)
        for name, shard in zip(names, shards, strict=True):
            writer = SafetensorsWriter(folder / name, [(tensor.name, dtype, tensor.shape) for tensor, dtype in shard])
            for tensor, tensor_dtype in shard:
                for _ in _parts(tensor, arch, table, edge):
                    _append(writer, *next(parts), tensor_dtype)
            writer.close()
    if count > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard}
        _write_json(folder / INDEX, {'metadata': {'total_size': sum(sizes)}, 'weight_map': weight_map})


def _file_dtype(tensor: HFTensor, table: Table, dtype_of: DtypeOf) -> np.dtype:
    """The one that holds all that the leaves of its pieces do."""
    leaves = [(piece.group, piece.leaf) for piece in tensor.pieces]
    own = [np.dtype(np.float32) if table[group][leaf].float32 else dtype_of(group, leaf) for group, leaf in leaves]
    return reduce(jnp.promote_types, own)


def _parts(tensor: HFTensor, arch: Arch, table: Table, edge: Edge) -> Iterator[_Part]:
    """The parts of leaves whose rows are the tensor's, in order."""
    mixers = {layer_name(i): mixer for i, mixer in enumerate(arch.mixers)}
    for piece in tensor.pieces:
        param, mixer = table[piece.group][piece.leaf], mixers.get(piece.group)
        if piece.expert is None:
            axis = cut_axis(param, mixer, per_expert=False)
            unit_bytes = 4 * math.prod(param.shape) // param.shape[axis]
            for index in cuts(param.shape, axis, edge(piece.group, piece.leaf, axis), unit_bytes, PART_BYTES):
                yield _Part(piece, param, mixer, index)
        else:
            expert = (slice(at, at + 1) for at in expert_index(param, mixer, piece.expert))
            yield _Part(piece, param, mixer, (*expert, *(slice(0, size) for size in param.shape[2:])))


def _read_ahead(parts: list[_Part], leaf_reader: LeafReader, reading: ThreadPoolExecutor) -> Iterator[tuple[_Part, np.ndarray]]:
    """The parts with what they hold; the next ones are read while one is written."""

    def load(part: _Part) -> np.ndarray:
        group, name, declared = part.piece.group, part.piece.leaf, part_of(part.param, part.index).shape
        leaf = np.asarray(leaf_reader(group, name, part.index))
        if leaf.shape != declared:
            raise UserError(f'{group}/{name} has shape {leaf.shape}, but the slice declares {declared}')
        return leaf

    ahead: deque[tuple[_Part, Future[np.ndarray]]] = deque()
    for part in parts:
        ahead.append((part, reading.submit(load, part)))
        if len(ahead) > AHEAD:
            first, leaf = ahead.popleft()
            yield first, leaf.result()
    for first, leaf in ahead:
        yield first, leaf.result()


def _append(writer: SafetensorsWriter, part: _Part, leaf: np.ndarray, dtype: np.dtype) -> None:
    """Writes the part's rows, about a megabyte at a time."""
    own = rank_order(leaf, part_of(part.param, part.index), part.mixer) if part.piece.expert is None else leaf[0, 0]
    rows = as_rows(own, part.param, part.piece)
    step = max(1, BLOCK_BYTES // max(1, rows[:1].nbytes))
    for at in range(0, len(rows), step):
        writer.append(row_major(rows[at : at + step]).astype(dtype, copy=False))


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + '\n')
