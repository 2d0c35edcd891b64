"""Matmuls with a block's parameters."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from elastic_jax.model.kernels import Target, row_major

# Parts of a contraction: XLA on CPU multiplies a vector by a matrix on one core, and the parts on all.
PARTS, LEAST = 2, 256


def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] times kernel [I, *O], in the type of x: [..., *O]."""
    kernel, width = kernel.astype(x.dtype), x.shape[-1]
    plain = lambda x, kernel: jnp.tensordot(x, kernel, axes=1)
    if x.size != width or width % PARTS or width < LEAST:
        return plain(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=_by_parts, default=plain)


def into(x: jax.Array, kernel: jax.Array, target: Target) -> jax.Array:
    """`linear`, whose output the next kernel reads as it lies: one matrix times another, both row by row in a TPU's memory."""
    flat_DxO = row_major(kernel.reshape(kernel.shape[0], -1), target)
    return row_major(linear(x, flat_DxO), target).reshape(*x.shape[:-1], *kernel.shape[1:])


def out_of(x: jax.Array, kernel: jax.Array, target: Target) -> jax.Array:
    """x [..., I], of which a kernel's output is taken as it lies, times kernel [*I, D]: [..., D]."""
    # D leads, as it does where the kernel is gathered and its gradient scattered.
    flat_DxI = row_major(kernel.reshape(-1, kernel.shape[-1]).T, target)
    return linear(row_major(x, target), flat_DxI.T)


def _by_parts(x: jax.Array, kernel: jax.Array) -> jax.Array:
    shape = kernel.shape[1:]
    split = lambda u, *own: u.reshape(PARTS, -1, *own)
    sums = jnp.einsum('pi,pio->po', split(x), split(kernel, math.prod(shape)))
    return jnp.sum(sums, axis=0).reshape(*x.shape[:-1], *shape)
