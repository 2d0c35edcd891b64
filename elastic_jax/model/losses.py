"""Losses with the unembedding fused in: no [tokens, vocabulary] array is ever alive for more than one chunk of the sequence.

Gradients are made in the forward pass, chunk by chunk, while the logits are at hand (as fused cross-entropy kernels do), so the
backward pass neither stores nor recomputes logits, and the teacher's logits are made once for all budgets. On TPU kernels
(`kl_kernel.py`) read logits and teacher's logits once for divergence and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elastic_jax.model.collectives import Axes, part_index, total
from elastic_jax.model.kernels import ANYWHERE, Target, by_kernel
from elastic_jax.model.kl_kernel import fits_kl_kernel, kl_and_gradient_by_kernel, top_and_sum_by_kernel

Hiddens = tuple[jax.Array, ...]


def kl_losses(
    students: Sequence[tuple[jax.Array, jax.Array]],
    teacher: tuple[jax.Array, jax.Array],
    mask_BxT: jax.Array,
    count: jax.Array | float,
    chunk: int = 512,
    axes: Axes = (),
    target: Target = ANYWHERE,
) -> jax.Array:
    """Forward KL(teacher ‖ student) in nats per token, for each student: [N].

    Args:
      students: (hidden states [B, T, D'], unembedding [D', V]) of each budget; D' may differ.
      teacher: the same of the teacher; no gradient flows to it.
      mask_BxT: weight of each token. count: what the weighted sum is divided by.
      axes: the mesh axes that split the vocabulary. target: a Context's.
    """
    hiddens, tables = zip(*students, strict=True)
    teacher = jax.lax.stop_gradient(teacher)
    return _fused_losses(_How('kl', chunk, axes, target), tuple(hiddens), tuple(tables), teacher, mask_BxT / count)


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
    hiddens, tables = zip(*students, strict=True)
    log_p = jax.nn.log_softmax(log_p_BxTxK1.astype(jnp.float32))
    target = (ids_BxTxK.astype(jnp.int32), log_p)
    return _fused_losses(_How('top_k', chunk, axes), tuple(hiddens), tuple(tables), target, mask_BxT / count)


def top_k_log_probs(
    hidden_BxTxD: jax.Array, kernel_DxV: jax.Array, k: int, chunk: int = 512, axes: Axes = ()
) -> tuple[jax.Array, jax.Array]:
    """(ids [B, T, K], log-probabilities [B, T, K + 1], the last of which is the tail's) of a teacher: what a cache keeps."""
    length = hidden_BxTxD.shape[1]
    chunk = min(chunk, length)

    def step(_: None, hidden: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        z = _logits(hidden, kernel_DxV)
        log_p = z - _log_total(z, axes)
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
    hiddens, tables = zip(*students, strict=True)
    return _fused_losses(_How('cross_entropy', chunk, axes), tuple(hiddens), tuple(tables), targets_BxT, mask_BxT / count)


class _How(NamedTuple):
    """Which loss, and how it is computed: arguments of the public functions."""

    kind: str
    chunk: int
    axes: Axes
    target: Target = ANYWHERE


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_losses(how: _How, hiddens: Hiddens, tables: Hiddens, target: Any, weight_BxT: jax.Array) -> jax.Array:
    return _run(how, hiddens, tables, target, weight_BxT, with_gradients=False)[0]


def _run(
    how: _How, hiddens: Hiddens, tables: Hiddens, target: Any, weight_BxT: jax.Array, with_gradients: bool
) -> tuple[jax.Array, Hiddens, Hiddens]:
    """(losses [N], gradients of the hiddens, gradients of the unembeddings in float32)."""
    length = weight_BxT.shape[1]
    chunk = min(how.chunk, length)
    teacher_table = None
    if how.kind == 'kl':
        target, teacher_table = target
    split = lambda x: _split(x, chunk)
    scanned = jax.tree.map(split, (hiddens, weight_BxT, target))

    def step(table_grads: Hiddens, inputs: Any) -> tuple[Hiddens, Any]:
        chunk_hiddens, weight_BxQ, chunk_target = inputs
        compare = _comparison(how, chunk_target, teacher_table, tables[0].shape[-1])
        losses, hidden_grads, new_grads = [], [], []
        for hidden, table, table_grad in zip(chunk_hiddens, tables, table_grads, strict=True):
            per_token, grad = compare(_logits(hidden, table), weight_BxQ, hidden.dtype)
            # Not 0 · per_token: a masked token may be infinite.
            losses.append(jnp.sum(jnp.where(weight_BxQ > 0, per_token * weight_BxQ, 0.0)))
            if with_gradients:
                hidden_grads.append(jnp.einsum('bqv,dv->bqd', grad, table.astype(grad.dtype)))
                new_grads.append(table_grad + jnp.einsum('bqd,bqv->dv', hidden, grad, preferred_element_type=jnp.float32))
        return tuple(new_grads) if with_gradients else table_grads, (jnp.stack(losses), tuple(hidden_grads))

    zeros = tuple(jnp.zeros(table.shape if with_gradients else (), jnp.float32) for table in tables)
    table_grads, (losses_CxN, hidden_grads) = jax.lax.scan(step, zeros, scanned)
    join = lambda x: _join(x, length)
    # Each device saw its part of the vocabulary.
    losses_N, hidden_grads = total((losses_CxN.sum(0), tuple(map(join, hidden_grads))), how.axes)
    return losses_N, hidden_grads, table_grads


# (logits [B, Q, V'], weight [B, Q], dtype) -> (this device's part of the loss [B, Q], weighted gradient by the logits in dtype)
Comparison = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]]


def _comparison(how: _How, target: Any, teacher_table: jax.Array | None, own_vocab: int) -> Comparison:
    if how.kind == 'kl':
        return _kl_comparison(how, _logits(target, teacher_table))
    if how.kind == 'top_k':
        against = _top_k_comparison(*target, own_vocab, how.axes)
    else:
        p = jax.nn.one_hot(target - part_index(how.axes) * own_vocab, own_vocab, dtype=jnp.float32)
        against = lambda log_q: (-jnp.sum(p * log_q, axis=-1), p)

    def compare(z: jax.Array, weight_BxQ: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        log_q = z - _log_total(z, how.axes)
        per_token, p = against(log_q)
        return per_token, ((jnp.exp(log_q) - p) * weight_BxQ[..., None]).astype(dtype)

    return compare


def _kl_comparison(how: _How, teacher_BxQxV: jax.Array) -> Comparison:
    target = how.target if fits_kl_kernel(math.prod(teacher_BxQxV.shape[:2])) else ANYWHERE
    log_total = lambda z: _log_total(z, how.axes, target)
    teacher_log_total = log_total(teacher_BxQxV)

    def compare(z: jax.Array, weight_BxQ: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        args = z, teacher_BxQxV, log_total(z), teacher_log_total, weight_BxQ[..., None]
        return by_kernel(target, partial(_by_rows, kl_and_gradient_by_kernel, dtype), partial(_kl_and_gradient, dtype), *args)

    return compare


def _kl_and_gradient(
    dtype: Any, z: jax.Array, teacher: jax.Array, log_total: jax.Array, teacher_log_total: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    log_q, log_p = z - log_total, teacher - teacher_log_total
    p = jnp.exp(log_p)
    return jnp.sum(p * (log_p - log_q), axis=-1), ((jnp.exp(log_q) - p) * weight).astype(dtype)


def _by_rows(kernel: Callable[..., Any], dtype: Any, *args: jax.Array, interpret: bool) -> Any:
    """A kernel for rows [N, ...], of arrays [B, Q, ...]."""
    outputs = kernel(*(x.reshape(-1, x.shape[-1]) for x in args), *(() if dtype is None else (dtype,)), interpret=interpret)
    return tuple(x.reshape(*args[0].shape[:2], *x.shape[1:]) for x in outputs)


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


def _log_total(z_BxQxV: jax.Array, axes: Axes, target: Target = ANYWHERE) -> jax.Array:
    """log Σ_v exp(z) over the whole vocabulary, [B, Q, 1]."""
    kernel = partial(_by_rows, top_and_sum_by_kernel, None)
    top, own = by_kernel(target, kernel, _top_and_sum, z_BxQxV)
    if axes:
        own_top, top = top, jax.lax.pmax(top, axes)
        own = total(own * jnp.exp(own_top - top), axes)
    return top + jnp.log(own)


def _top_and_sum(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    top = jnp.max(z, axis=-1, keepdims=True)
    return top, jnp.sum(jnp.exp(z - top), axis=-1, keepdims=True)


def _logits(hidden: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.einsum('bqd,dv->bqv', hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _forward(how: _How, hiddens: Hiddens, tables: Hiddens, target: Any, weight_BxT: jax.Array) -> Any:
    losses, hidden_grads, table_grads = _run(how, hiddens, tables, target, weight_BxT, with_gradients=True)
    table_grads = tuple(grad.astype(table.dtype) for grad, table in zip(table_grads, tables, strict=True))
    return losses, (hidden_grads, table_grads)


def _backward(how: _How, residuals: Any, cotangent_N: jax.Array) -> Any:
    hidden_grads, table_grads = residuals
    scale = lambda grads: tuple((cotangent_N[n] * grad).astype(grad.dtype) for n, grad in enumerate(grads))
    return scale(hidden_grads), scale(table_grads), None, None


_fused_losses.defvjp(_forward, _backward)
