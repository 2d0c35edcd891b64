"""From an elastic checkpoint to a Hugging Face folder, one leaf at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from etils import epath

from elastic_jax.arch import Arch
from elastic_jax.checkpoint.leaf_reader import LeafReader
from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.checkpoint.restore import read_manifest, step_directory
from elastic_jax.data.tokenizers import ByteTokenizer
from elastic_jax.errors import UserError
from elastic_jax.hf.export import export_folder


def export_checkpoint(
    checkpoint: epath.PathLike,
    child: Arch,
    out: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    budget: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes the slice `child` of a checkpoint to `out` for transformers and vLLM, reading only the slice's own bytes.

    Args:
      checkpoint: a workdir, or one step of it. dtype: as stored by default. budget: its name, for the model card.
    Raises: UserError when the slice does not nest, transformers cannot hold it or `out` is taken; WorkError when it cannot be
      written.
    """
    manifest = read_manifest(checkpoint)
    read = LeafReader(checkpoint, child)
    config = manifest.hf_config
    is_bytes = manifest.tokenizer == ByteTokenizer.spec
    return export_folder(
        out,
        child,
        read,
        layout=manifest.layout,
        dtype=dtype or str(read.dtype('embedding', 'table')),
        hf_config=config,
        tokenizer_folder=None if is_bytes else _tokenizer_folder(checkpoint, manifest),
        eos_token_id=ByteTokenizer.eos_id if is_bytes else None,
        card=_facts(manifest, budget),
        max_shard_bytes=max_shard_bytes,
    )


def _tokenizer_folder(checkpoint: epath.PathLike, manifest: Manifest) -> epath.Path:
    """The tokenizer kept beside the checkpoints, wherever the workdir was moved to; else where the manifest says."""
    beside = step_directory(checkpoint).parent.parent / 'tokenizer'
    folder = beside if beside.exists() else epath.Path(manifest.tokenizer['folder'])
    if not (folder / 'tokenizer.json').exists():
        raise UserError(f'the tokenizer of {checkpoint} is no longer in {folder}; put its files into {beside}')
    return folder


def _facts(manifest: Manifest, budget: str | None) -> dict[str, Any]:
    facts = {'parent': (manifest.hf_config or {}).get('_name_or_path'), 'step': manifest.step, 'budget': budget}
    if budget in manifest.budgets:
        facts['metrics'] = {
            name: value for name, value in manifest.budgets[budget].metrics.items() if isinstance(value, int | float)
        }
    return facts
