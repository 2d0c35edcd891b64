"""Finding a checkpoint and reading what it says of itself."""

from __future__ import annotations

import json

from etils import epath

from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.errors import UserError


def step_directory(path: epath.PathLike) -> epath.Path:
    """The step directory of a path that names one, or the newest good one of a workdir."""
    path = epath.Path(path).resolve()  # Orbax wants absolute paths
    if not path.exists():
        raise UserError(f'{path} does not exist; give a workdir of elastic train, or one step of its checkpoints')
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
