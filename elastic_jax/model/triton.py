"""Pallas's Triton backend, or None where JAX has none: newer versions say that they will drop it.

What has kernels for NVIDIA GPUs asks here, and is XLA's form without it.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    try:
        from jax.experimental.pallas import triton as plgpu
    except ImportError:
        plgpu = None

__all__ = ['plgpu']
