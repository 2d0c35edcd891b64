"""Root-mean-square norms, computed in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.model.shapes import lead


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, ratio: Any = 1.0, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """scale · x / rms(x) over `axes`.

    A masked x of which only `ratio` of the channels are kept gives what the sliced norm gives (method.md §2): the mean
    runs over fewer channels, so eps is scaled by the ratio and the result by its square root.
    """
    x32 = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
    normed = x32 * jax.lax.rsqrt(mean_square + eps * ratio) * jnp.sqrt(jnp.asarray(ratio, jnp.float32))
    return (normed * lead(scale, x32).astype(jnp.float32)).astype(x.dtype)
