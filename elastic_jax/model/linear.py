"""Matmuls with a block's parameters."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Parts of a contraction: XLA on CPU multiplies a vector by a matrix on one core, and the parts on all.
PARTS, LEAST = 2, 256


def linear(x: jax.Array, kernel: jax.Array, inputs: int = 1) -> jax.Array:
    """x [..., *I] times kernel [*I, *O] over the last `inputs` dimensions of x, in the type of x: [..., *O]."""
    kernel = kernel.astype(x.dtype)
    rows, width = x.shape[: x.ndim - inputs], math.prod(kernel.shape[:inputs])
    if math.prod(rows) != 1 or width % PARTS or width < LEAST:
        return jnp.tensordot(x, kernel, axes=inputs)
    plain = lambda x, kernel: jnp.tensordot(x, kernel, axes=inputs)
    return jax.lax.platform_dependent(x, kernel, cpu=lambda x, kernel: _by_parts(x, kernel, rows, inputs), default=plain)


def _by_parts(x: jax.Array, kernel: jax.Array, rows: tuple[int, ...], inputs: int) -> jax.Array:
    shape = kernel.shape[inputs:]
    split = lambda u, *own: u.reshape(PARTS, -1, *own)
    sums = jnp.einsum('pi,pio->po', split(x), split(kernel, math.prod(shape)))
    return jnp.sum(sums, axis=0).reshape(*rows, *shape)
