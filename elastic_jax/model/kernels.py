"""Which form of an operation runs: a Pallas kernel, or what XLA makes of plain JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

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
