"""Collectives of a model whose parts live on several devices, for use inside a fully manual `shard_map`.

Every device runs the same program on its part. The gradient is that of the sum of the devices' losses over the mesh axes that
split the batch; over an axis that splits a block's units (tensor) the loss is one and the same. So a block that is split starts
with `enter`, whose backward pass adds the parts' gradients, and ends with `leave`, which adds the parts' outputs
(Megatron-LM's f and g, arXiv 1909.08053). With no axes all of these do nothing.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.model.tiles import LANES

Axes = tuple[str, ...]
# What is sent for parameters carries this name in compiled programs and profiles; all else is activations.
FETCH = 'fetch_parameters'


@dataclasses.dataclass(frozen=True)
class Shards:
    """What this device's part of the model and of the batch is; by default all of both.

    Attributes:
      data: mesh axes that the batch is split over.
      split: (logical axis of the table of parameters, mesh axes it is split over while computing) pairs.
    """

    data: Axes = ()
    split: tuple[tuple[str, Axes], ...] = ()

    def of(self, logical: str) -> Axes:
        """The mesh axes that split a logical axis."""
        return dict(self.split).get(logical, ())


WHOLE = Shards()


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


def enter(x: Any, axes: Axes) -> Any:
    """x, on its way into what is split over `axes`."""
    return _enter(x, axes) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _enter(x: Any, axes: Axes) -> Any:
    return x


_enter.defvjp(lambda x, axes: (x, None), lambda axes, _, grad: (total(grad, axes),))


def leave(x: Any, axes: Axes) -> Any:
    """The sum of the parts over `axes`."""
    return _leave(x, axes) if axes else x


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _leave(x: Any, axes: Axes) -> Any:
    return total(x, axes)


_leave.defvjp(lambda x, axes: (total(x, axes), None), lambda axes, _, grad: (grad,))


def total(x: Any, axes: Axes) -> Any:
    """The sum over `axes`; for what no gradient flows through."""
    return jax.lax.psum(x, axes) if axes else x


def part_index(axes: Axes) -> jax.Array | int:
    """Which part of what is split over `axes` this device has; the first axis counts most."""
    return jax.lax.axis_index(axes) if axes else 0


def fetch(w: jax.Array, axes: Axes, dim: int, dtype: Any) -> jax.Array:
    """A parameter in `dtype`, whole along `dim`, from the parts on `axes`; its gradient is reduced to those parts in float32.

    One mesh axis at a time: a gather over a whole torus compiles to an all-reduce of the full size.
    """
    return _fetch(w, axes, dim, dtype) if axes else w


def fetch_summed(w: jax.Array, axes: Axes, dim: int, dtype: Any) -> Summed:
    """`fetch`, also of what is whole here, with a place in float32 for the sum of its users' gradients."""
    return Summed(*_fetch_summed(w, axes, dim, dtype))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _fetch(w: jax.Array, axes: Axes, dim: int, dtype: Any) -> jax.Array:
    with jax.named_scope(FETCH):
        shape, at = _in_lanes(w.shape, dim)
        part = w.astype(dtype).reshape(shape)
        for axis in reversed(axes):
            part = jax.lax.all_gather(part, axis, axis=at, tiled=True)
        return part.reshape(*w.shape[:dim], -1, *w.shape[dim + 1 :])


def _fetch_forward(w: jax.Array, axes: Axes, dim: int, dtype: Any) -> tuple[jax.Array, Any]:
    return _fetch(w, axes, dim, dtype), jnp.zeros((0,), w.dtype)


def _fetch_backward(axes: Axes, dim: int, dtype: Any, like: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    with jax.named_scope(FETCH):
        shape, at = _in_lanes(grad.shape, dim)
        part = grad.astype(jnp.promote_types(like.dtype, jnp.float32)).reshape(shape)
        for axis in axes:
            part = jax.lax.psum_scatter(part, axis, scatter_dimension=at, tiled=True)
        return (part.reshape(*grad.shape[:dim], -1, *grad.shape[dim + 1 :]).astype(like.dtype),)


_fetch.defvjp(_fetch_forward, _fetch_backward)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _fetch_summed(w: jax.Array, axes: Axes, dim: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    whole = _fetch(w, axes, dim, dtype)
    return whole, jnp.zeros(whole.shape, jnp.float32)


def _fetch_summed_forward(w: jax.Array, axes: Axes, dim: int, dtype: Any) -> tuple[tuple[jax.Array, jax.Array], Any]:
    return _fetch_summed(w, axes, dim, dtype), jnp.zeros((0,), w.dtype)


def _fetch_summed_backward(
    axes: Axes, dim: int, dtype: Any, like: jax.Array, grads: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array]:
    grad, total = grads
    return _fetch_backward(axes, dim, dtype, like, total + grad.astype(jnp.float32))


_fetch_summed.defvjp(_fetch_summed_forward, _fetch_summed_backward)


def _in_lanes(shape: tuple[int, ...], dim: int) -> tuple[tuple[int, ...], int]:
    """`shape` with what is beside `dim` merged until a last dimension fills a TPU's lanes, and where `dim` then is.

    Arrays are stored and sent in whole tiles of the last two dimensions, of which heads of 64 channels would fill a half.
    """

    def merged(dims: tuple[int, ...]) -> tuple[int, ...]:
        while len(dims) > 2 and dims[-1] < LANES:
            dims = (*dims[:-2], dims[-2] * dims[-1])
        return dims

    before, after = merged(shape[:dim]), merged(shape[dim + 1 :])
    return (*before, shape[dim], *after), len(before)


def gather_rows(x: jax.Array, axes: Axes) -> jax.Array:
    """All parts' rows, one after the other; the backward pass adds what every part made of a row."""
    for axis in reversed(axes):
        x = jax.lax.all_gather(x, axis, axis=0, tiled=True)
    return x


def scatter_rows(x: jax.Array, axes: Axes) -> jax.Array:
    """This part's rows of the sum over the parts: the inverse way of `gather_rows`."""
    for axis in axes:
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
    return x
