"""Losses with the unembedding fused in: no [tokens, vocabulary] array is ever alive for more than one chunk of the sequence.

Gradients are made in the forward pass, chunk by chunk, while the logits are at hand (as fused cross-entropy kernels do), so the
backward pass neither stores nor recomputes logits, and the teacher's logits are made once for all budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def top_k_kl_losses(
    students: Sequence[tuple[jax.Array, jax.Array]],
    ids_BxTxK: jax.Array,
    log_p_BxTxK1: jax.Array,
    mask_BxT: jax.Array,
    count: jax.Array | float,
    chunk: int = 512,
    axes: Axes = (),
) -> jax.Array:
    """KL from a teacher of which only the top k probabilities and the mass of all others are known, for each student: [N].

    With the tail as one outcome, P = Σ_{j∉K} p_j and Q = Σ_{j∉K} q_j:

      KL_K = Σ_{i∈K} p_i log(p_i / q_i) + P log(P / Q)  ≤  KL(p ‖ q),

    by the log-sum inequality: equal where the student shares the teacher's proportions within the tail, and where K is the
    whole vocabulary. Its gradient by the logits is q − p̃, with p̃_i = p_i in K and P q_j / Q outside.

    Args:
      ids_BxTxK: the top k tokens. log_p_BxTxK1: their log-probabilities, and last that of the tail (−inf: no tail); scaled here
        to sum to 1. The others as of `kl_losses`.
    """
    hiddens, kernels = zip(*students, strict=True)
    log_p = jax.nn.log_softmax(log_p_BxTxK1.astype(jnp.float32))
    target = (ids_BxTxK.astype(jnp.int32), log_p)
    return _fused_losses('top_k', chunk, axes, tuple(hiddens), tuple(kernels), target, mask_BxT / count)


def top_k_log_probs(
    hidden_BxTxD: jax.Array, kernel_DxV: jax.Array, k: int, chunk: int = 512, axes: Axes = ()
) -> tuple[jax.Array, jax.Array]:
    """(ids [B, T, K], log-probabilities [B, T, K + 1], the last of which is the tail's) of a teacher: what a cache keeps."""
    length = hidden_BxTxD.shape[1]
    chunk = min(chunk, length)

    def step(_: None, hidden: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        log_p = _log_softmax(_logits(hidden, kernel_DxV), axes)
        own_vocab = log_p.shape[-1]
        values, ids = jax.lax.top_k(log_p, min(k, own_vocab))
        ids = ids + part_index(axes) * own_vocab
        if axes:
            values, ids = (jax.lax.all_gather(x, axes, axis=-1, tiled=True) for x in (values, ids))
            values, place = jax.lax.top_k(values, k)
            ids = jnp.take_along_axis(ids, place, axis=-1)
        rest = jnp.where(_members(ids, own_vocab, axes), -jnp.inf, log_p)
        tail = jnp.log(total(jnp.sum(jnp.exp(rest), axis=-1, keepdims=True), axes))
        return None, (ids, jnp.concatenate([values, tail], axis=-1))

    _, found = jax.lax.scan(step, None, _split(hidden_BxTxD, chunk))
    return jax.tree.map(lambda x: _join(x, length), found)


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
    length = weight_BxT.shape[1]
    chunk = min(chunk, length)
    teacher_kernel = None
    if kind == 'kl':
        target, teacher_kernel = target
    split = lambda x: _split(x, chunk)
    scanned = jax.tree.map(split, (hiddens, weight_BxT, target))

    def step(kernel_grads: Hiddens, inputs: Any) -> tuple[Hiddens, Any]:
        chunk_hiddens, weight_BxQ, chunk_target = inputs
        compare = _comparison(kind, chunk_target, teacher_kernel, kernels[0].shape[-1], axes)
        losses, hidden_grads, new_grads = [], [], []
        for hidden, kernel, kernel_grad in zip(chunk_hiddens, kernels, kernel_grads, strict=True):
            log_q = _log_softmax(_logits(hidden, kernel), axes)
            per_token, p = compare(log_q)
            # Not 0 · per_token: a masked token may be infinite.
            losses.append(jnp.sum(jnp.where(weight_BxQ > 0, per_token * weight_BxQ, 0.0)))
            if with_gradients:
                grad = ((jnp.exp(log_q) - p) * weight_BxQ[..., None]).astype(hidden.dtype)
                hidden_grads.append(jnp.einsum('bqv,dv->bqd', grad, kernel.astype(grad.dtype)))
                new_grads.append(kernel_grad + jnp.einsum('bqd,bqv->dv', hidden, grad, preferred_element_type=jnp.float32))
        return tuple(new_grads) if with_gradients else kernel_grads, (jnp.stack(losses), tuple(hidden_grads))

    zeros = tuple(jnp.zeros(kernel.shape if with_gradients else (), jnp.float32) for kernel in kernels)
    kernel_grads, (losses_CxN, hidden_grads) = jax.lax.scan(step, zeros, scanned)
    join = lambda x: _join(x, length)
    # Each device saw its part of the vocabulary.
    losses_N, hidden_grads = total((losses_CxN.sum(0), tuple(map(join, hidden_grads))), axes)
    return losses_N, hidden_grads, kernel_grads


Comparison = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def _comparison(kind: str, target: Any, teacher_kernel: jax.Array | None, own_vocab: int, axes: Axes) -> Comparison:
    """log q [B, Q, V'] -> (this device's part of the loss [B, Q], what the gradient draws q to [B, Q, V'])."""
    if kind == 'top_k':
        return _top_k_comparison(*target, own_vocab, axes)
    if kind == 'kl':
        log_p = _log_softmax(_logits(target, teacher_kernel), axes)
        p = jnp.exp(log_p)
        return lambda log_q: (jnp.sum(p * (log_p - log_q), axis=-1), p)
    p = jax.nn.one_hot(target - part_index(axes) * own_vocab, own_vocab, dtype=jnp.float32)
    return lambda log_q: (-jnp.sum(p * log_q, axis=-1), p)


def _top_k_comparison(ids_BxQxK: jax.Array, log_p_BxQxK1: jax.Array, own_vocab: int, axes: Axes) -> Comparison:
    member, (rows, columns, local) = _members(ids_BxQxK, own_vocab, axes), _places(ids_BxQxK, own_vocab, axes)
    log_p, log_tail = log_p_BxQxK1[..., :-1], log_p_BxQxK1[..., -1]
    p, tail, here = jnp.exp(log_p), jnp.exp(log_tail), local < own_vocab
    dense_p = jnp.zeros(member.shape, jnp.float32).at[rows, columns, local].set(p, mode='drop')

    def compare(log_q: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_q_k = jnp.take_along_axis(log_q, jnp.minimum(local, own_vocab - 1), axis=-1)
        q_outside = jnp.where(member, 0.0, jnp.exp(log_q))
        mass = jnp.maximum(total(jnp.sum(q_outside, axis=-1), axes), jnp.finfo(jnp.float32).tiny)
        known = jnp.sum(jnp.where(here & (p > 0), p * (log_p - log_q_k), 0.0), axis=-1)
        unknown = jnp.where(tail > 0, tail * (log_tail - jnp.log(mass)), 0.0)
        # The tail is one outcome of the whole vocabulary, whichever device has the first part of it counts it.
        per_token = known + jnp.where(part_index(axes) == 0, unknown, 0.0)
        return per_token, dense_p + (tail / mass)[..., None] * q_outside

    return compare


def _places(ids_BxQxK: jax.Array, own_vocab: int, axes: Axes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Indices of this device's part of [B, Q, V'] at which the ids stand; those of other devices are out of range."""
    local = ids_BxQxK - part_index(axes) * own_vocab
    local = jnp.where((local >= 0) & (local < own_vocab), local, own_vocab)
    batch, length, _ = ids_BxQxK.shape
    return jnp.arange(batch)[:, None, None], jnp.arange(length)[None, :, None], local


def _members(ids_BxQxK: jax.Array, own_vocab: int, axes: Axes) -> jax.Array:
    """Whether each entry of this device's part of the vocabulary is one of the ids: [B, Q, V']."""
    shape = (*ids_BxQxK.shape[:2], own_vocab)
    return jnp.zeros(shape, jnp.bool_).at[_places(ids_BxQxK, own_vocab, axes)].set(True, mode='drop')


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """[B, T, …] -> [chunks, B, chunk, …], padded with zeros."""
    padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_split`."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, x.shape[-1])[:, :length]


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
