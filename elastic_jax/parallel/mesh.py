"""The mesh: four axes, whatever the machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from elastic_jax.arch import unknown_name
from elastic_jax.errors import UserError

# replica: copies of everything, across pod slices. fsdp: parameters and batch. expert: experts and batch. tensor: units of a
# block. Neighbours on the last axes are the closest ones, which is where the most is sent.
AXES = ('replica', 'fsdp', 'expert', 'tensor')


def mesh_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The size of every axis, with one that is given as -1 filled in.

    Raises: UserError for an unknown axis, a size that is neither -1 nor positive, or a product that the devices do not give.
    """
    for name in sizes:
        if name not in AXES:
            raise UserError(unknown_name('mesh axis', name, list(AXES)))
    full = {name: int(sizes.get(name, 1)) for name in AXES}
    shown = ' × '.join(f'{name}={size}' for name, size in full.items())
    wrong = [name for name, size in full.items() if size != -1 and size < 1]
    if wrong:
        raise UserError(f'config.mesh.{wrong[0]}={full[wrong[0]]}; give a positive size, or -1 for all remaining devices')
    filled = [name for name, size in full.items() if size == -1]
    if len(filled) > 1:
        raise UserError(f'config.mesh fills in {" and ".join(filled)}; give all sizes but one')
    given = math.prod(size for size in full.values() if size != -1)
    if filled and devices % given == 0:
        full[filled[0]] = devices // given
    if (filled and devices % given) or given > devices:
        fix = f'a product that divides {devices}' if filled else f'sizes whose product is {devices}, or one of them as -1'
        raise UserError(f'config.mesh ({shown}) does not fit {devices} devices; give {fix}')
    return full


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (default: all there are), laid out along their interconnect.

    Sizes whose product is smaller use the first devices of a single process. Raises: UserError as `mesh_sizes`.
    """
    devices = list(jax.devices() if devices is None else devices)
    full = mesh_sizes(sizes, len(devices))
    used = math.prod(full.values())
    if used < len(devices) and jax.process_count() > 1:
        raise UserError(f'config.mesh uses {used} of {len(devices)} devices of several processes; give one size as -1')
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.Mesh(_arranged(tuple(full.values()), devices[:used]), AXES, axis_types=types)


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array whose neighbours are neighbours on the interconnect; replicas are on slices of their own."""
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(f'config.mesh.replica={shape[0]} does not split over {slices} slices; take a multiple of {slices}')
    within, across = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
