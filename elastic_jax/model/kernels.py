"""Which form of an operation runs: a Pallas kernel, or what XLA makes of plain JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

# auto: kernels on TPU, plain elsewhere; xla: plain everywhere; pallas: kernels everywhere, interpreted where there is no TPU.
KERNELS = ('auto', 'xla', 'pallas')


def by_platform(kernels: str, kernel: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
    """`plain(*args)` or `kernel(*args, interpret=…)`, two forms of one function, by the platform that a program is compiled for.

    That need not be this machine's: `elastic plan` compiles the kernels of a TPU on a CPU. A kernel computes one device's own
    part: where several devices share an array, it is for use inside a fully manual `shard_map`.
    """
    if kernels == 'xla':
        return plain(*args)
    elsewhere = plain if kernels == 'auto' else partial(kernel, interpret=True)
    return jax.lax.platform_dependent(*args, tpu=partial(kernel, interpret=False), default=elsewhere)
