"""Losses with the unembedding fused in: no [tokens, vocabulary] array is ever alive for more than one chunk of the sequence.

Gradients are made in the forward pass, chunk by chunk, while the logits are at hand (as fused cross-entropy kernels do), so the
backward pass neither stores nor recomputes logits, and the teacher's logits are made once for all budgets. On TPU kernels
(`kl_kernel.py`) read logits and teacher's logits once for divergence and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elastic_jax.model.collectives import Axes, part_index, total
from elastic_jax.model.kernels import ANYWHERE, Target, by_kernel
from elastic_jax.model.kl_kernel import fits_kl_kernel, kl_and_gradient_by_kernel, top_and_sum_by_kernel

Arrays = tuple[jax.Array, ...]


class Students(NamedTuple):
    """Budgets of one unembedding [D, V], of which each uses as many leading rows as its hidden states [B, T, D'] are wide.

    Nothing is cut out: the rows are read where they lie, and the budgets' gradients are added up in one table.
    """

    hiddens: Arrays
    kernel_DxV: jax.Array


def kl_losses(
    students: Sequence[Students],
    weights: Sequence[float],
    teacher: tuple[jax.Array, jax.Array],
    mask_BxT: jax.Array,
    count: jax.Array | float,
    chunk: int = 512,
    axes: Axes = (),
    target: Target = ANYWHERE,
) -> tuple[jax.Array, jax.Array]:
    """Forward KL(teacher ‖ student) in nats per token: (the weighted sum; each budget's [N], of which no gradient flows).

    Args:
      students: N budgets in all. weights: of each in the sum.
      teacher: (hidden states [B, T, D], unembedding [D, V]); no gradient flows to it.
      mask_BxT: weight of each token. count: what the weighted sum is divided by.
      axes: the mesh axes that split the vocabulary. target: a Context's.
    """
    how = _How('kl', tuple(weights), chunk, axes, target)
    return _fused_losses(how, tuple(students), jax.lax.stop_gradient(teacher), mask_BxT / count)


def top_k_kl_losses(
    students: Sequence[Students],
    weights: Sequence[float],
    ids_BxTxK: jax.Array,
    log_p_BxTxK1: jax.Array,
    mask_BxT: jax.Array,
    count: jax.Array | float,
    chunk: int = 512,
    axes: Axes = (),
) -> tuple[jax.Array, jax.Array]:
    """KL from a teacher of which only the top k probabilities and the mass of all others are known.

    With the tail as one outcome, P = Σ_{j∉K} p_j and Q = Σ_{j∉K} q_j:

      KL_K = Σ_{i∈K} p_i log(p_i / q_i) + P log(P / Q)  ≤  KL(p ‖ q),

    by the log-sum inequality: equal where the student shares the teacher's proportions within the tail, and where K is the
    whole vocabulary. Its gradient by the logits is q − p̃, with p̃_i = p_i in K and P q_j / Q outside.

    Args:
      ids_BxTxK: the top k tokens. log_p_BxTxK1: their log-probabilities, and last that of the tail (−inf: no tail); scaled here
        to sum to 1. The others, and what comes back, as of `kl_losses`.
    """
    log_p = jax.nn.log_softmax(log_p_BxTxK1.astype(jnp.float32))
    target = (ids_BxTxK.astype(jnp.int32), log_p)
    return _fused_losses(_How('top_k', tuple(weights), chunk, axes), tuple(students), target, mask_BxT / count)


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
    students: Sequence[Students],
    weights: Sequence[float],
    targets_BxT: jax.Array,
    mask_BxT: jax.Array,
    count: jax.Array | float,
    chunk: int = 512,
    axes: Axes = (),
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy with the next tokens in nats per token. Arguments, and what comes back, as of `kl_losses`."""
    how = _How('cross_entropy', tuple(weights), chunk, axes)
    return _fused_losses(how, tuple(students), targets_BxT, mask_BxT / count)


class _How(NamedTuple):
    """Which loss, and how it is computed: arguments of the public functions."""

    kind: str
    weights: tuple[float, ...]
    chunk: int
    axes: Axes
    target: Target = ANYWHERE


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_losses(how: _How, students: tuple[Students, ...], target: Any, weight_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses_N = _run(how, students, target, weight_BxT, with_gradients=False)[0]
    return _weighted(how, losses_N), losses_N


def _weighted(how: _How, losses_N: jax.Array) -> jax.Array:
    return losses_N @ jnp.asarray(how.weights, jnp.float32)


def _run(
    how: _How, students: tuple[Students, ...], target: Any, weight_BxT: jax.Array, with_gradients: bool
) -> tuple[jax.Array, tuple[Students, ...]]:
    """(losses [N], gradients of the weighted sum by the students: of unembeddings in float32)."""
    length = weight_BxT.shape[1]
    chunk = min(how.chunk, length)
    teacher_table = None
    if how.kind == 'kl':
        target, teacher_table = target
    scanned = jax.tree.map(lambda x: _split(x, chunk), ([own.hiddens for own in students], weight_BxT, target))
    shares = iter(how.weights)
    shares = [[next(shares) for _ in own.hiddens] for own in students]

    def step(sums: list[Arrays], inputs: Any) -> tuple[list[Arrays], Any]:
        chunk_hiddens, weight_BxQ, chunk_target = inputs
        compare = _comparison(how, chunk_target, teacher_table, students[0].kernel_DxV.shape[-1])
        losses, hidden_grads, new_sums = [], [], []
        for (_, table), hiddens, own, share in zip(students, chunk_hiddens, sums, shares, strict=True):
            grads = []
            for hidden, weight in zip(hiddens, share, strict=True):
                rows_DxV = table[: hidden.shape[-1]].astype(hidden.dtype)
                per_token, grad = compare(_logits(hidden, rows_DxV), weight_BxQ, weight, hidden.dtype)
                # Not 0 · per_token: a masked token may be infinite.
                losses.append(jnp.sum(jnp.where(weight_BxQ > 0, per_token * weight_BxQ, 0.0)))
                grads.append((jnp.einsum('bqv,dv->bqd', grad, rows_DxV) if with_gradients else None, grad))
            if with_gradients:
                hidden_grads.append(tuple(by_hidden for by_hidden, _ in grads))
                new_sums.append(_add_bands(own, hiddens, [by_logits for _, by_logits in grads]))
        return new_sums if with_gradients else sums, (jnp.stack(losses), hidden_grads)

    zeros = [_zero_bands(own) if with_gradients else () for own in students]
    sums, (losses_CxN, hidden_grads) = jax.lax.scan(step, zeros, scanned)
    # Each device saw its part of the vocabulary.
    joined = jax.tree.map(lambda x: _join(x, length), hidden_grads)
    losses_N, hidden_grads = total((losses_CxN.sum(0), joined), how.axes)
    if not with_gradients:
        return losses_N, ()
    tables = [_joined_bands(own, len(student.kernel_DxV)) for own, student in zip(sums, students, strict=True)]
    return losses_N, tuple(map(Students, hidden_grads, tables))


def _bands(widths: Iterable[int]) -> list[tuple[int, int]]:
    """Rows of an unembedding that the same budgets use, each (first, end): what they add is added to one array, in place."""
    ends = sorted(set(widths))
    return list(zip([0, *ends], ends, strict=False))


def _zero_bands(own: Students) -> Arrays:
    bands = _bands(hidden.shape[-1] for hidden in own.hiddens)
    return tuple(jnp.zeros((end - first, own.kernel_DxV.shape[-1]), jnp.float32) for first, end in bands)


def _add_bands(sums: Arrays, hiddens: Arrays, grads: Sequence[jax.Array]) -> Arrays:
    """`sums` and the hidden states times the gradients by the logits."""
    result = []
    for own, (first, end) in zip(sums, _bands(hidden.shape[-1] for hidden in hiddens), strict=True):
        for hidden, grad in zip(hiddens, grads, strict=True):
            if hidden.shape[-1] >= end:
                rows = hidden[..., first:end]
                own = own + jnp.einsum('bqd,bqv->dv', rows, grad, preferred_element_type=jnp.float32)
        result.append(own)
    return tuple(result)


def _joined_bands(sums: Arrays, rows: int) -> jax.Array:
    """The gradient of the whole unembedding, of whose last rows there may be no use."""
    used = jnp.concatenate(sums)
    return jnp.pad(used, ((0, rows - len(used)), (0, 0)))


# (logits [B, Q, V'], weight [B, Q], the budget's weight, dtype) -> (this device's part of the loss [B, Q], the gradient of the
# weighted sum by the logits in dtype)
Comparison = Callable[[jax.Array, jax.Array, float, Any], tuple[jax.Array, jax.Array]]


def _comparison(how: _How, target: Any, teacher_table: jax.Array | None, own_vocab: int) -> Comparison:
    if how.kind == 'kl':
        return _kl_comparison(how, _logits(target, teacher_table))
    if how.kind == 'top_k':
        against = _top_k_comparison(*target, own_vocab, how.axes)
    else:
        p = jax.nn.one_hot(target - part_index(how.axes) * own_vocab, own_vocab, dtype=jnp.float32)
        against = lambda log_q: (-jnp.sum(p * log_q, axis=-1), p)

    def compare(z: jax.Array, weight_BxQ: jax.Array, share: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
        log_q = z - _log_total(z, how.axes)
        per_token, p = against(log_q)
        return per_token, ((jnp.exp(log_q) - p) * (share * weight_BxQ)[..., None]).astype(dtype)

    return compare


def _kl_comparison(how: _How, teacher_BxQxV: jax.Array) -> Comparison:
    target = how.target if fits_kl_kernel(math.prod(teacher_BxQxV.shape[:2])) else ANYWHERE
    log_total = lambda z: _log_total(z, how.axes, target)
    teacher_log_total = log_total(teacher_BxQxV)

    def compare(z: jax.Array, weight_BxQ: jax.Array, share: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
        args = z, teacher_BxQxV, log_total(z), teacher_log_total, (share * weight_BxQ)[..., None]
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


def _forward(how: _How, students: tuple[Students, ...], target: Any, weight_BxT: jax.Array) -> Any:
    losses_N, grads = _run(how, students, target, weight_BxT, with_gradients=True)
    grads = jax.tree.map(lambda grad, own: grad.astype(own.dtype), grads, students)
    return (_weighted(how, losses_N), losses_N), grads


def _backward(how: _How, grads: tuple[Students, ...], cotangents: tuple[jax.Array, jax.Array]) -> Any:
    return jax.tree.map(lambda grad: (cotangents[0] * grad).astype(grad.dtype), grads), None, None


_fused_losses.defvjp(_forward, _backward)
