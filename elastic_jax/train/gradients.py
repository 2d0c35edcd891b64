"""Loss and gradients of a step: micro-batch after micro-batch on one device, or on every device of a mesh at once.

Over a mesh this is one fully manual `shard_map`: each device runs the loss of its part of the batch with its part of the
parameters, and what is exchanged is written down (`model/collectives.py`). So one gather of a layer and one reduction of its
gradient serve all budgets, whatever the partitioner of the day would have made of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from elastic_jax.arch import Arch
from elastic_jax.model.collectives import Axes, total
from elastic_jax.parallel.sharding import batch_spec, spec_axes, tree_specs

if TYPE_CHECKING:
    from elastic_jax.train.step import StepConfig

Metrics = dict[str, jax.Array]
# (learned, fixed, batch, count of scored tokens in the whole batch) -> (this device's part of the loss, metrics).
Loss = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Metrics]]
Gradients = Callable[[Any, Any, Any], tuple[jax.Array, Metrics, Any]]


def loss_and_gradients(loss_fn: Loss, parent: Arch, config: StepConfig) -> Gradients:
    """(learned, fixed, batch) -> (loss, metrics, gradients of learned, stored as it is).

    In `learned` and `fixed`, trees of the parent's parameters are stored as the rules say and all else is whole everywhere.
    Metrics named `loss…` are the devices' parts of a sum; all others are the same on every device.
    """
    data = config.shards(parent).data

    def run(learned: Any, fixed: Any, batch: Any) -> tuple[jax.Array, Metrics, Any]:
        count = jnp.maximum(total(jnp.sum(batch['loss_mask']), data), 1.0)
        loss, metrics, grads = accumulated(loss_fn, learned, fixed, batch, count, config.accumulate)
        summed = {key: value for key, value in metrics.items() if key.startswith('loss')}
        loss, summed = total((loss, summed), data)
        return loss, metrics | summed, grads

    if config.mesh is None:
        return run
    specs = config.specs(parent)

    def over_mesh(learned: Any, fixed: Any, batch: Any) -> tuple[jax.Array, Metrics, Any]:
        own_specs = tree_specs(learned, specs)

        def reduced(learned: Any, fixed: Any, batch: Any) -> tuple[jax.Array, Metrics, Any]:
            loss, metrics, grads = run(learned, fixed, batch)
            return loss, metrics, reduce_gradients(grads, own_specs, data)

        in_specs = (own_specs, tree_specs(fixed, specs), batch_spec(config.mesh))
        return manual(reduced, config, in_specs, (PartitionSpec(), PartitionSpec(), own_specs))(learned, fixed, batch)

    return over_mesh


def summed_loss(loss_fn: Loss, parent: Arch, config: StepConfig) -> Callable[[Any, Any], jax.Array]:
    """(params, batch) -> the total over the batch's scored tokens, without gradients; for evaluating where training runs."""

    def run(params: Any, batch: Any) -> jax.Array:
        return total(loss_fn(params, {}, batch, jnp.ones(()))[0], config.shards(parent).data)

    if config.mesh is None:
        return run
    return manual(run, config, (config.specs(parent), batch_spec(config.mesh)), PartitionSpec())


def manual(run: Callable[..., Any], config: StepConfig, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`run`, once on every device of the mesh with its parts."""
    return jax.shard_map(run, mesh=config.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def reduce_gradients(grads: Any, specs: Any, data: Axes) -> Any:
    """Sums each gradient over the mesh axes that split the batch and not the parameter, over which `fetch` has summed it.

    All that have the same axes to be summed over go in one reduction.
    """
    leaves, treedef = jax.tree.flatten(grads)
    missing = []
    for spec in treedef.flatten_up_to(specs):
        stored = {axis for dim in range(len(spec)) for axis in spec_axes(spec, dim)}
        missing.append(tuple(axis for axis in data if axis not in stored))
    for axes in sorted(set(missing)):
        same = [i for i, own in enumerate(missing) if own == axes]
        for i, leaf in zip(same, total([leaves[i] for i in same], axes), strict=True):
            leaves[i] = leaf
    return treedef.unflatten(leaves)


def accumulated(
    loss_fn: Loss, learned: Any, fixed: Any, batch: Any, count: jax.Array, pieces: int
) -> tuple[jax.Array, Metrics, Any]:
    """(loss, metrics, gradients) over micro-batches one after the other.

    Every micro-batch is divided by the whole batch's token count, so their sum is exactly the whole batch's loss.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if pieces == 1:
        (loss, metrics), grads = value_and_grad(learned, fixed, batch, count)
        return loss, metrics, grads
    split = jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), batch)

    def add(sums: Any, piece: Any) -> tuple[Any, None]:
        (loss, metrics), grads = value_and_grad(learned, fixed, piece, count)
        return jax.tree.map(jnp.add, sums, (loss, metrics, grads)), None

    (loss, metrics), grads = jax.eval_shape(value_and_grad, learned, fixed, jax.tree.map(lambda x: x[0], split), count)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, metrics, grads))
    (loss, metrics, grads), _ = jax.lax.scan(add, zeros, split)
    averaged = {key: value if key.startswith('loss') else value / pieces for key, value in metrics.items()}
    return loss, averaged, grads


def differentiable(gradients: Gradients) -> Callable[[Any, Any, Any], tuple[jax.Array, Metrics]]:
    """The loss and metrics alone, as a function that autodiff may go through on its way to `learned`."""

    @jax.custom_vjp
    def run(learned: Any, fixed: Any, batch: Any) -> tuple[jax.Array, Metrics]:
        return gradients(learned, fixed, batch)[:2]

    def forward(learned: Any, fixed: Any, batch: Any) -> tuple[tuple[jax.Array, Metrics], Any]:
        loss, metrics, grads = gradients(learned, fixed, batch)
        return (loss, metrics), grads

    def backward(grads: Any, cotangents: tuple[jax.Array, Any]) -> tuple[Any, None, None]:
        return jax.tree.map(lambda grad: (cotangents[0] * grad).astype(grad.dtype), grads), None, None

    run.defvjp(forward, backward)
    return run
