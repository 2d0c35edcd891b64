"""A workdir belongs to one experiment: its config is written once, and a different one is refused."""

from __future__ import annotations

import json
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from elastic_jax.data.tokenizers import TOKENIZER_FILES
from elastic_jax.errors import UserError

# Keys that may change between runs of one experiment, since no number of the result depends on them.
FREE = ('log_every', 'checkpoint', 'compilation_cache', 'mesh', 'wandb', 'profile')


def claim_workdir(workdir: epath.Path, config: ConfigDict, write: bool = True) -> None:
    """Writes `config.json`, or checks that the workdir's own says the same. Raises UserError naming the keys that differ.

    Of several processes all check, and one has `write`.
    """
    wanted = flatten(json.loads(config.to_json()))
    path = workdir / 'config.json'
    if path.exists():
        try:
            found = flatten(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise UserError(f'{path} is not JSON ({error}); restore it or take another --workdir') from error
        differ = [
            key
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key) and key.split('.')[0] not in FREE
        ]
        if differ and not _has_checkpoints(workdir):
            # Nothing was trained under the old config, which may be the mistake that is being mended.
            if write:
                path.write_text(json.dumps(json.loads(config.to_json()), indent=1))
        elif differ:
            shown = ', '.join(f'{key}: {found.get(key)!r} there, {wanted.get(key)!r} here' for key in differ[:5])
            more = f' and {len(differ) - 5} more' if len(differ) > 5 else ''
            raise UserError(f'{workdir} holds another experiment ({shown}{more}); take another --workdir or the same config')
        return
    if _has_checkpoints(workdir):
        raise UserError(f'{workdir} has checkpoints but no config.json; take another --workdir or restore that file')
    if not write:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(json.loads(config.to_json()), indent=1))


def keep_tokenizer(workdir: epath.Path, folder: str) -> None:
    """Copies a Hugging Face tokenizer beside the checkpoints, which can then be moved without it; 'bytes' has no files."""
    if folder == 'bytes':
        return
    (workdir / 'tokenizer').mkdir(parents=True, exist_ok=True)
    for path in epath.Path(folder).iterdir():
        if path.name in TOKENIZER_FILES and not (workdir / 'tokenizer' / path.name).exists():
            path.copy(workdir / 'tokenizer' / path.name)


def _has_checkpoints(workdir: epath.Path) -> bool:
    root = workdir / 'checkpoints'
    return root.exists() and any(entry.name.isdigit() for entry in root.iterdir())


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Dotted key -> value of nested JSON objects."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f'{prefix}.{key}' if prefix else key)
    return flat
