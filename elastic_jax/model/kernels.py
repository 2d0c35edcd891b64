"""Which form of an operation runs: a Pallas kernel, or what XLA makes of plain JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint

# auto: kernels on TPU, plain elsewhere, as those for NVIDIA GPUs were compiled for one and never timed on one; xla: plain
# everywhere; pallas: kernels on TPU and NVIDIA GPUs, and TPU's interpreted on CPU.
KERNELS = ('auto', 'xla', 'pallas')


def by_platform(
    kernels: str,
    kernel: Callable[..., Any] | None,
    plain: Callable[..., Any],
    *args: Any,
    cuda: Callable[..., Any] | None = None,
) -> Any:
    """`plain(*args)` or `kernel(*args, interpret=…)`, two forms of one function, by the platform that a program is compiled for.

    That need not be this machine's: `elastic plan` compiles the kernels of a TPU on a CPU. A kernel computes one device's own
    part: where several devices share an array, it is for use inside a fully manual `shard_map`. `kernel` is for TPU and `cuda`
    for NVIDIA GPUs; either is None where there is none for these shapes.
    """
    forms = {}
    if kernel is not None and kernels != 'xla':
        forms['tpu'] = partial(kernel, interpret=False)
    if kernels == 'pallas':
        forms |= {} if kernel is None else {'cpu': partial(kernel, interpret=True)}
        forms |= {} if cuda is None else {'cuda': partial(cuda, interpret=False)}
    return jax.lax.platform_dependent(*args, **forms, default=plain) if forms else plain(*args)


def row_major(x: jax.Array, kernels: str) -> jax.Array:
    """`x`, on TPU stored with its last dimension along the lanes, as gathers and kernels have it; so is its gradient.

    XLA may prefer tokens there for a matmul's sake, and then copies what kernels and gathers give and take.
    """
    kept = lambda x, interpret: with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return by_platform(kernels, kept, lambda x: x, x)
