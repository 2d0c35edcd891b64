"""Losses with the unembedding fused in: no [tokens, vocabulary] array is ever alive for more than one chunk of the sequence.

Gradients are made in the forward pass, chunk by chunk, while the logits are at hand (as fused cross-entropy kernels do), so the
backward pass neither stores nor recomputes logits, and the teacher's logits are made once for all budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.model.collectives import Axes, part_index, total

Hiddens = tuple[jax.Array, ...]


def kl_losses(
    students: Sequence[tuple[jax.Array, jax.Array]],
    teacher: tuple[jax.Array, jax.Array],
    mask_BxT: jax.Array,
    count: jax.Array | float,
    chunk: int = 512,
    axes: Axes = (),
) -> jax.Array:
    """Forward KL(teacher ‖ student) in nats per token, for each student: [N].

    Args:
      students: (hidden states [B, T, D'], unembedding [D', V]) of each budget; D' may differ.
      teacher: the same of the teacher; no gradient flows to it.
      mask_BxT: weight of each token. count: what the weighted sum is divided by.
      axes: the mesh axes that split the vocabulary.
    """
    hiddens, kernels = zip(*students, strict=True)
    teacher = jax.lax.stop_gradient(teacher)
    return _fused_losses('kl', chunk, axes, tuple(hiddens), tuple(kernels), teacher, mask_BxT / count)


def cross_entropy_losses(
    students: Sequence[tuple[jax.Array, jax.Array]],
    targets_BxT: jax.Array,
    mask_BxT: jax.Array,
    count: jax.Array | float,
    chunk: int = 512,
    axes: Axes = (),
) -> jax.Array:
    """Cross-entropy with the next tokens in nats per token, for each student: [N]. Arguments as of `kl_losses`."""
    hiddens, kernels = zip(*students, strict=True)
    return _fused_losses('cross_entropy', chunk, axes, tuple(hiddens), tuple(kernels), targets_BxT, mask_BxT / count)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fused_losses(
    kind: str, chunk: int, axes: Axes, hiddens: Hiddens, kernels: Hiddens, target: Any, weight_BxT: jax.Array
) -> jax.Array:
    return _run(kind, chunk, axes, hiddens, kernels, target, weight_BxT, with_gradients=False)[0]


def _run(
    kind: str,
    chunk: int,
    axes: Axes,
    hiddens: Hiddens,
    kernels: Hiddens,
    target: Any,
    weight_BxT: jax.Array,
    with_gradients: bool,
) -> tuple[jax.Array, Hiddens, Hiddens]:
    """(losses [N], gradients of the hiddens, gradients of the kernels in float32)."""
    batch, length = weight_BxT.shape
    chunk = min(chunk, length)
    pad = -length % chunk

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, -1, chunk, *x.shape[2:]), 1, 0)

    if kind == 'kl':
        teacher_BxTxD, teacher_kernel = target
        scanned = (tuple(map(split, hiddens)), split(weight_BxT), split(teacher_BxTxD))
    else:
        teacher_kernel = None
        scanned = (tuple(map(split, hiddens)), split(weight_BxT), split(target))

    def step(kernel_grads: Hiddens, inputs: Any) -> tuple[Hiddens, Any]:
        chunk_hiddens, weight_BxQ, chunk_target = inputs
        if kind == 'kl':
            log_p = _log_softmax(_logits(chunk_target, teacher_kernel), axes)
            p = jnp.exp(log_p)
        else:
            own_vocab = kernels[0].shape[-1]
            p = jax.nn.one_hot(chunk_target - part_index(axes) * own_vocab, own_vocab, dtype=jnp.float32)
            log_p = None
        losses, hidden_grads, new_grads = [], [], []
        for hidden, kernel, kernel_grad in zip(chunk_hiddens, kernels, kernel_grads, strict=True):
            log_q = _log_softmax(_logits(hidden, kernel), axes)
            per_token = -jnp.sum(p * log_q, axis=-1) if log_p is None else jnp.sum(p * (log_p - log_q), axis=-1)
            # Not 0 · per_token: a masked token may be infinite.
            losses.append(jnp.sum(jnp.where(weight_BxQ > 0, per_token * weight_BxQ, 0.0)))
            if with_gradients:
                grad = ((jnp.exp(log_q) - p) * weight_BxQ[..., None]).astype(hidden.dtype)
                hidden_grads.append(jnp.einsum('bqv,dv->bqd', grad, kernel.astype(grad.dtype)))
                new_grads.append(kernel_grad + jnp.einsum('bqd,bqv->dv', hidden, grad, preferred_element_type=jnp.float32))
        return tuple(new_grads) if with_gradients else kernel_grads, (jnp.stack(losses), tuple(hidden_grads))

    zeros = tuple(jnp.zeros(kernel.shape if with_gradients else (), jnp.float32) for kernel in kernels)
    kernel_grads, (losses_CxN, hidden_grads) = jax.lax.scan(step, zeros, scanned)
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, x.shape[-1])[:, :length]
    # Each device saw its part of the vocabulary.
    losses_N, hidden_grads = total((losses_CxN.sum(0), tuple(map(join, hidden_grads))), axes)
    return losses_N, hidden_grads, kernel_grads


def _log_softmax(logits_BxQxV: jax.Array, axes: Axes) -> jax.Array:
    if not axes:
        return jax.nn.log_softmax(logits_BxQxV)
    top = jax.lax.pmax(jnp.max(logits_BxQxV, axis=-1, keepdims=True), axes)
    shifted = logits_BxQxV - top
    return shifted - jnp.log(total(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True), axes))


def _logits(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.einsum('bqd,dv->bqv', hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _forward(kind: str, chunk: int, axes: Axes, hiddens: Hiddens, kernels: Hiddens, target: Any, weight_BxT: jax.Array) -> Any:
    losses, hidden_grads, kernel_grads = _run(kind, chunk, axes, hiddens, kernels, target, weight_BxT, with_gradients=True)
    kernel_grads = tuple(grad.astype(kernel.dtype) for grad, kernel in zip(kernel_grads, kernels, strict=True))
    return losses, (hidden_grads, kernel_grads)


def _backward(kind: str, chunk: int, axes: Axes, residuals: Any, cotangent_N: jax.Array) -> Any:
    hidden_grads, kernel_grads = residuals
    scale = lambda grads: tuple((cotangent_N[n] * grad).astype(grad.dtype) for n, grad in enumerate(grads))
    return scale(hidden_grads), scale(kernel_grads), None, None


_fused_losses.defvjp(_forward, _backward)
