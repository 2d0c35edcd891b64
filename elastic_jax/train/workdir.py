"""A workdir belongs to one experiment: its config is written once, and a different one is refused."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from elastic_jax.checkpoint.stored import read_manifest, tokenizer_files
from elastic_jax.data.tokenizers import TOKENIZER_FILES
from elastic_jax.errors import UserError
from elastic_jax.train.config import default_config, stage

# Keys that may change between runs of one experiment, since nothing that is trained depends on them (but for rounding).
FREE = (
    *('log_every', 'checkpoint', 'compilation_cache', 'mesh', 'kernels', 'wandb', 'profile'),
    *('eval', 'evaluators', 'samples'),
)
# Seconds after which a file that one host has written is there for all: network file systems may take a minute.
SEEN_WITHIN = 90


def check_workdir(workdir: epath.Path, config: ConfigDict) -> bool:
    """Whether `config.json` has still to be written. Raises UserError naming the keys in which the workdir's own differs."""
    path = workdir / 'config.json'
    if not path.exists():
        if _has_checkpoints(workdir):
            raise UserError(f'{workdir} has checkpoints but no config.json; take another --workdir or restore that file')
        return True
    try:
        found = _completed(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f'{path} is not JSON ({error}); restore it or take another --workdir') from error
    wanted = _completed(_plain(config))
    differ = [
        key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key) and key.split('.')[0] not in FREE
    ]
    # Without checkpoints nothing was trained under the old config, which may be the mistake that is being mended.
    if differ and _has_checkpoints(workdir):
        shown = ', '.join(f'{key}: {found.get(key)!r} there, {wanted.get(key)!r} here' for key in differ[:5])
        more = f' and {len(differ) - 5} more' if len(differ) > 5 else ''
        raise UserError(f'{workdir} holds another experiment ({shown}{more}); take another --workdir or the same config')
    return bool(differ)


def claim_workdir(workdir: epath.Path, config: ConfigDict) -> None:
    """Writes what makes the workdir this experiment's: `config.json`, and the tokenizer's files."""
    try:
        anew = check_workdir(workdir, config)
        workdir.mkdir(parents=True, exist_ok=True)
        # Before the config, which says of what they are: cut off between the two, the next attempt writes both again.
        keep_tokenizer(workdir, config.data.tokenizer, config.parent.checkpoint, anew)
        if anew:
            (workdir / 'config.json').write_text(json.dumps(_plain(config), indent=1))
    except OSError as error:
        raise UserError(f'{workdir} cannot be written ({error.strerror or error}); take a --workdir that can be') from error


def check_shared(workdir: epath.Path, config: ConfigDict) -> None:
    """That this process sees what the main one has written. Raises UserError when the workdir is a folder of one host."""
    deadline = time.monotonic() + SEEN_WITHIN
    while check_workdir(workdir, config):
        if time.monotonic() > deadline:
            raise UserError(
                f'{workdir} on {socket.gethostname()} is not the folder that process 0 writes to; take a --workdir that all '
                'hosts share, such as gs://BUCKET/RUN'
            )
        time.sleep(1)


def keep_tokenizer(workdir: epath.Path, folder: str, parent: str = '', anew: bool = False) -> None:
    """Copies a Hugging Face tokenizer beside the checkpoints, which can then be moved without it.

    'bytes' has no files; then those go along that the parent's checkpoint carries. `anew`: in the place of another's files, which
    an earlier attempt may have left.
    """
    kept = workdir / 'tokenizer'
    if anew and kept.exists() and epath.Path(folder).resolve() != kept.resolve():
        for name in TOKENIZER_FILES:  # whatever else is there is not a run's
            (kept / name).unlink(missing_ok=True)
    if folder == 'bytes':
        carried = tokenizer_files(parent, read_manifest(parent)) if parent else None
        if carried is None:
            return
        folder = os.fspath(carried)
    kept.mkdir(parents=True, exist_ok=True)
    for path in epath.Path(folder).iterdir():
        if path.name in TOKENIZER_FILES and not (kept / path.name).exists():
            path.copy(kept / path.name)


def _has_checkpoints(workdir: epath.Path) -> bool:
    root = workdir / 'checkpoints'
    return root.exists() and any(entry.name.isdigit() for entry in root.iterdir())


def _plain(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json())


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, with the defaults of the keys that there were not yet when the config was written."""
    defaults = flatten(_plain(default_config()))
    for name in config.get('stages', {}):
        defaults |= flatten(_plain(stage('elastic', 1, 1, 1)), f'stages.{name}')
    return defaults | flatten(config)


def flatten(tree: Any, prefix: str = '') -> dict[str, Any]:
    """Dotted key -> value of nested JSON objects."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f'{prefix}.{key}' if prefix else key)
    return flat
