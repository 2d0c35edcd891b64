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

Axes = tuple[str, ...]


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
