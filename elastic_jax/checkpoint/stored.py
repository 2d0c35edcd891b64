"""Finding a checkpoint and reading what it says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterable

from etils import epath

from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.errors import UserError


def step_directory(path: epath.PathLike) -> epath.Path:
    """The step directory of a path that names one, or the newest good one of a workdir."""
    path = epath.Path(path).resolve()  # Orbax wants absolute paths
    if not path.exists():
        raise UserError(f'{path} does not exist; give a workdir of elastic train, or one step of its checkpoints')
    if path.is_file():
        raise UserError(f'{path} is a file; give a workdir of elastic train, or one step of its checkpoints')
    if (path / 'params').exists() or (path / 'manifest').exists():
        return path
    root = path / 'checkpoints' if (path / 'checkpoints').exists() else path
    steps = sorted((int(entry.name) for entry in root.iterdir() if entry.name.isdigit()), reverse=True)
    if not steps:
        raise UserError(f'{path} has no checkpoints; give a workdir of elastic train, or one step of its checkpoints')
    return root / str(steps[0])


def read_manifest(path: epath.PathLike) -> Manifest:
    """The manifest of a workdir's newest step, or of one step. Raises UserError when it is missing or damaged."""
    directory = step_directory(path)
    where = directory / 'manifest' / 'metadata'
    try:
        data = json.loads(where.read_text())
    except FileNotFoundError as error:
        raise UserError(f'{directory} has no manifest; it is not an elastic checkpoint, or it is damaged') from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f'{where} is not JSON ({error}); restore it, or use another checkpoint') from error
    return Manifest.from_json(data, str(where))


def tokenizer_folder(path: epath.PathLike, manifest: Manifest) -> epath.Path | None:
    """The tokenizer's files: beside the checkpoints, wherever the workdir was moved to, else where the manifest says.

    None when text is read as bytes. Raises: UserError when they are in neither place.
    """
    if manifest.tokenizer.get('kind') == 'bytes':
        return None
    beside = step_directory(path).parent.parent / 'tokenizer'
    folder = beside if beside.exists() else epath.Path(manifest.tokenizer['folder'])
    if not (folder / 'tokenizer.json').exists():
        raise UserError(f'the tokenizer of {path} is no longer in {folder}; put its files into {beside}')
    return folder


def tokenizer_files(path: epath.PathLike, manifest: Manifest) -> epath.Path | None:
    """The folder of tokenizer files that go along with every slice: also of a tokenizer that only its own library reads.

    None when there are none. Raises: UserError as `tokenizer_folder`.
    """
    beside = step_directory(path).parent.parent / 'tokenizer'
    return tokenizer_folder(path, manifest) or (beside if beside.exists() else None)


def keep_files(source: epath.PathLike, target: epath.PathLike, names: Iterable[str]) -> None:
    """Copies those of the files `names` that there are."""
    source, target = epath.Path(source), epath.Path(target)
    found = [source / name for name in names if (source / name).exists()]
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for path in found:
        (target / path.name).write_bytes(path.read_bytes())
