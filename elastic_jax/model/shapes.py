"""Broadcasting, written down: the tests run with JAX's implicit rank promotion forbidden."""

from __future__ import annotations

import jax


def lead(u: jax.Array, like: jax.Array) -> jax.Array:
    """u with dimensions of size one before its own, so that it has as many as `like`."""
    return jax.lax.expand_dims(u, range(like.ndim - u.ndim))
