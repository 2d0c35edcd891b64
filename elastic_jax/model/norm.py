"""Root-mean-square norms, computed in float32 at least."""

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
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
    normed = wide * jax.lax.rsqrt(mean_square + eps * ratio) * jnp.sqrt(jnp.asarray(ratio, wide.dtype))
    return (normed * lead(scale, wide).astype(wide.dtype)).astype(x.dtype)
