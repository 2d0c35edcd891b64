"""Which form of an operation runs: a Pallas kernel, or what XLA makes of plain JAX; and for which platform."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint

from elastic_jax.model.tiles import MEMORY

# config.kernels. auto: kernels on TPU, plain elsewhere, as those for NVIDIA GPUs were compiled for one and never timed on one;
# xla: plain everywhere; pallas: kernels on TPU and NVIDIA GPUs, and TPU's interpreted on CPU.
KERNELS = ('auto', 'xla', 'pallas')
OLD_TPUS, SMALL_MEMORY = ('TPU v2', 'TPU v3', 'TPU v4'), 12 * 2**20  # whose cores have 16 MiB of vector memory


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is traced for.

    Attributes:
      platform: 'cpu', 'tpu', 'cuda', 'rocm'; '' where it is not known yet: every form is traced then, and lowering takes one.
      kernels: whether Pallas kernels take the place of XLA's forms. A kernel computes one device's own part: where several
        devices share an array, it is for use inside a fully manual `shard_map`.
      memory: bytes that a kernel may take of a TPU core's vector memory.
    """

    platform: str = ''
    kernels: bool = False
    memory: int = MEMORY


ANYWHERE = Target()


def target_of(kernels: str, device: jax.Device | None = None) -> Target:
    """Of a program for `device` (default: JAX's), which may be of another machine (`elastic plan`), by one of KERNELS."""
    if device is None:
        default = jax.config.jax_default_device
        device = jax.devices(default)[0] if default is None or isinstance(default, str) else default
    platform = device.platform
    if platform == 'gpu':
        platform = 'rocm' if 'rocm' in device.client.platform_version else 'cuda'
    memory = SMALL_MEMORY if device.device_kind.startswith(OLD_TPUS) else MEMORY
    return Target(platform, kernels == 'pallas' or (kernels == 'auto' and platform == 'tpu'), memory)


def by_platform(target: Target, *args: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """The form of one function for the target's platform, called with `args`."""
    if target.platform:
        return forms.get(target.platform, default)(*args)
    return jax.lax.platform_dependent(*args, default=default, **forms) if forms else default(*args)


def by_kernel(
    target: Target,
    kernel: Callable[..., Any] | None,
    plain: Callable[..., Any],
    *args: Any,
    cuda: Callable[..., Any] | None = None,
) -> Any:
    """`plain(*args)` or `kernel(*args, interpret=…)`, two forms of one function.

    `kernel` is for TPU and `cuda` for NVIDIA GPUs; either is None where there is none for these shapes.
    """
    forms = {}
    if target.kernels and kernel is not None:
        forms = {'tpu': partial(kernel, interpret=False), 'cpu': partial(kernel, interpret=True)}
    if target.kernels and cuda is not None:
        forms['cuda'] = partial(cuda, interpret=False)
    return by_platform(target, *args, default=plain, **forms)


def row_major(x: jax.Array, target: Target) -> jax.Array:
    """`x`, on TPU stored with its last dimension along the lanes, as gathers and kernels have it; so is its gradient.

    XLA may prefer tokens there for a matmul's sake, and then copies what kernels and gathers give and take.
    """
    kept = lambda x, interpret: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return by_kernel(target, kept, lambda x: x, x)
