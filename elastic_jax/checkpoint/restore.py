"""Reading checkpoints: the manifest, and any slice of the parameters from its own bytes."""

from __future__ import annotations

import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from elastic_jax.arch import Arch
from elastic_jax.checkpoint.manifest import Manifest
from elastic_jax.errors import UserError
from elastic_jax.layout import Layout
from elastic_jax.model.params import leaves, param_dtype, param_table


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


def restore_slice(path: epath.PathLike, child: Arch, shardings: Any = None, dtype: Any = None) -> dict[str, Any]:
    """The parameters of `child`, read from the leading corner of each stored array.

    Args:
      path: a workdir or a step. child: any Arch that nests in the checkpoint's parent and respects its layout.
      shardings: group -> name -> Sharding; without it everything goes to the first device.
      dtype: of the parameters (those that must stay float32 do); default: as stored.
    Raises: UserError naming what does not nest, is missing, or has another shape than the manifest says.
    """
    directory = step_directory(path)
    manifest = read_manifest(directory)
    problem = child.why_not_nested(manifest.arch)
    if problem:
        raise UserError(problem)
    stored = stored_shapes(directory, manifest.arch, manifest.layout)
    table = param_table(child, manifest.layout.check(child))
    one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract: dict[str, dict[str, Any]] = {group: {} for group in table}
    restore_args: dict[str, dict[str, Any]] = {group: {} for group in table}
    for group, name, param in leaves(table):
        own_dtype = stored[group][name].dtype if dtype is None else param_dtype(param, dtype)
        sharding = one_device if shardings is None else shardings[group][name]
        abstract[group][name] = jax.ShapeDtypeStruct(param.shape, own_dtype, sharding=sharding)
        # strict=False reads a prefix; it would pad a request that is too large with zeros, hence `stored_shapes`.
        restore_args[group][name] = ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=param.shape, dtype=own_dtype, strict=False
        )
    arguments = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(directory / 'params', args=arguments)
        except (ValueError, OSError, KeyError) as error:
            raise UserError(f'{directory}/params is damaged ({_first_line(error)}); use another checkpoint') from error


def stored_shapes(directory: epath.Path, arch: Arch, layout: Layout) -> dict[str, dict[str, Any]]:
    """The metadata of every stored parameter, checked against the manifest. Raises UserError naming what does not fit."""
    try:
        metadata = ocp.PyTreeCheckpointHandler().metadata(directory / 'params').tree
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f'{directory}/params cannot be read ({_first_line(error)}); use another checkpoint') from error
    for group, name, param in leaves(param_table(arch, layout)):
        found = metadata.get(group, {}).get(name)
        if found is None:
            raise UserError(f'{directory} lacks parameter {group}/{name}; use another checkpoint')
        if tuple(found.shape) != param.shape:
            raise UserError(
                f'{directory}: parameter {group}/{name} has shape {tuple(found.shape)}, the manifest says {param.shape}'
            )
    return metadata


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
