"""Fetching parameters from the devices that store their parts, inside a fully manual `shard_map`."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.model.collectives import Axes

# What is sent for parameters carries this name in compiled programs and profiles; all else is activations.
FETCH = 'fetch_parameters'


@dataclasses.dataclass(frozen=True)
class Way:
    """From where and how a parameter comes.

    Attributes:
      axes: mesh axes that its parts are on; the first counts most.
      dim: which of its dimensions they split.
      matrix: it is sent as a matrix, with `dim`, which is its first or last, along the rows and all else along the columns.
    """

    axes: Axes = ()
    dim: int = 0
    matrix: bool = False


@partial(jax.tree_util.register_dataclass, data_fields=['w', 'total'], meta_fields=['last'])
@dataclasses.dataclass(frozen=True)
class Summed:
    """A parameter that several budgets use a part of, one after the other.

    Attributes:
      w: it, whole, in the dtype of the matmuls.
      total: its gradient's place: float32 of w's shape, which nobody reads. A use may give its part of the gradient to that, on
        top of what the uses after it gave, and returns it for the next one; all others give it to w.
      last: whether no other use follows, which means in the backward pass that it is the first and there is nothing to add to.
    """

    w: jax.Array
    total: jax.Array | None = None
    last: bool = True


def fetch(w: jax.Array, way: Way, dtype: Any) -> jax.Array:
    """A parameter in `dtype`, whole along the way's dimension; its gradient is reduced to the stored parts in float32.

    One mesh axis at a time: a gather over a whole torus compiles to an all-reduce of the full size.
    """
    return _fetch(w, way, dtype) if way.axes else w


def fetch_summed(w: jax.Array, way: Way, dtype: Any) -> Summed:
    """`fetch`, also of what is whole here, with a place in float32 for the sum of its users' gradients."""
    return Summed(*_fetch_summed(w, way, dtype))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _fetch(w: jax.Array, way: Way, dtype: Any) -> jax.Array:
    with jax.named_scope(FETCH):
        part, at = _as_sent(w.astype(dtype), way)
        for axis in reversed(way.axes):
            part = jax.lax.all_gather(part, axis, axis=at, tiled=True)
        return _as_stored(part, w.shape, way)


def _fetch_forward(w: jax.Array, way: Way, dtype: Any) -> tuple[jax.Array, Any]:
    return _fetch(w, way, dtype), jnp.zeros((0,), w.dtype)


def _fetch_backward(way: Way, dtype: Any, like: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    with jax.named_scope(FETCH):
        part, at = _as_sent(grad.astype(jnp.promote_types(like.dtype, jnp.float32)), way)
        for axis in way.axes:
            if way.matrix:  # every device's rows by themselves: where they are no whole tiles, edges would be sent once more
                part = part.reshape(jax.lax.axis_size(axis), -1, part.shape[-1])
            part = jax.lax.psum_scatter(part, axis, scatter_dimension=at, tiled=not way.matrix)
        return (_as_stored(part, grad.shape, way).astype(like.dtype),)


_fetch.defvjp(_fetch_forward, _fetch_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _fetch_summed(w: jax.Array, way: Way, dtype: Any) -> tuple[jax.Array, jax.Array]:
    whole = _fetch(w, way, dtype)
    return whole, jnp.zeros(whole.shape, jnp.float32)


def _fetch_summed_forward(w: jax.Array, way: Way, dtype: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    return _fetch_summed(w, way, dtype), jnp.zeros((0,), w.dtype)


def _fetch_summed_backward(way: Way, dtype: Any, like: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    grad, total = grads
    return _fetch_backward(way, dtype, like, total + grad.astype(jnp.float32))


_fetch_summed.defvjp(_fetch_summed_forward, _fetch_summed_backward)


def _as_sent(w: jax.Array, way: Way) -> tuple[jax.Array, int]:
    """`w` in the shape in which it is sent, and along which dimension.

    A TPU stores and sends whole tiles of the last two dimensions. Of [D, groups, channels] these would be one row of D each,
    and every use a copy into tiles of several rows, as matmuls have them.
    """
    if not way.matrix:
        return w, way.dim
    return (w.reshape(len(w), -1) if way.dim == 0 else w.reshape(-1, w.shape[-1]).T), 0


def _as_stored(sent: jax.Array, shape: tuple[int, ...], way: Way) -> jax.Array:
    """The inverse of `_as_sent`, of what is another size than `shape` along the way's dimension."""
    if not way.matrix:
        return sent
    return sent.reshape(-1, *shape[1:]) if way.dim == 0 else sent.T.reshape(*shape[:-1], -1)
