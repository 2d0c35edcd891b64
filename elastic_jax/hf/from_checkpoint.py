"""From an elastic checkpoint to a Hugging Face folder, one leaf at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from etils import epath

from elastic_jax.arch import Arch
from elastic_jax.checkpoint.leaf_reader import LeafReader
from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.checkpoint.stored import read_manifest, tokenizer_files, tokenizer_folder
from elastic_jax.data.tokenizers import load_tokenizer
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
    return export_folder(
        out,
        child,
        read,
        edge=read.edge,
        layout=manifest.layout,
        dtype=dtype or str(read.dtype('embedding', 'table')),
        dtype_of=None if dtype else read.dtype,
        hf_config=manifest.hf_config,
        tokenizer_folder=tokenizer_files(checkpoint, manifest),
        eos_token_id=None if manifest.hf_config else _ends(checkpoint, manifest),
        context=manifest.extra.get('context'),
        card=_facts(manifest, budget),
        max_shard_bytes=max_shard_bytes,
    )


def _ends(checkpoint: epath.PathLike, manifest: Manifest) -> int | list[int]:
    """What ends a text of a model that no config.json came with, as config.json has it: one token, or several."""
    folder = tokenizer_folder(checkpoint, manifest)
    ids = load_tokenizer(os.fspath(folder) if folder else 'bytes').stop_ids
    return ids[0] if len(ids) == 1 else list(ids)


def _facts(manifest: Manifest, budget: str | None) -> dict[str, Any]:
    facts = {'parent': (manifest.hf_config or {}).get('_name_or_path'), 'step': manifest.step, 'budget': budget}
    if budget in manifest.budgets:
        facts['metrics'] = {
            name: value for name, value in manifest.budgets[budget].metrics.items() if isinstance(value, int | float)
        }
    return facts
