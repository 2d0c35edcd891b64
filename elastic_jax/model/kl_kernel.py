"""What distillation does with logits on TPU, tile by tile of the vocabulary: their logsumexp, the divergence and its gradient.

Memory is what such passes take, and XLA makes more of them: for the sum over the vocabulary both logits are read once, for the
gradient once more. Lanes keep numbers of their own; only their last sum, by XLA, crosses them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from elastic_jax.model.tiles import BELOW, LANES

STRIP = 16  # the rows of a strip, whose values stay in registers
ROWS, COLUMNS = 256, 2048  # of a tile


def fits_kl_kernel(rows: int) -> bool:
    """Whether so many tokens are whole strips."""
    return rows % STRIP == 0


@partial(jax.jit, static_argnames='interpret')
def top_and_sum_by_kernel(z_NxV: jax.Array, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """(max_v z, Σ_v exp(z - max)), both [N, 1], of logits in float32."""
    tops_NxL, sums_NxL = _by_tiles(_top_and_sum, [z_NxV], [], [jnp.float32, jnp.float32], interpret)
    top_Nx1 = jnp.max(tops_NxL, axis=-1, keepdims=True)
    return top_Nx1, jnp.sum(sums_NxL * jnp.exp(tops_NxL - top_Nx1), axis=-1, keepdims=True)


@partial(jax.jit, static_argnames=('dtype', 'interpret'))
def kl_and_gradient_by_kernel(
    z_NxV: jax.Array,
    teacher_NxV: jax.Array,
    log_total_Nx1: jax.Array,
    teacher_log_total_Nx1: jax.Array,
    weight_Nx1: jax.Array,
    dtype: Any,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(Σ_v p log(p / q) [N], (q - p) · weight [N, V] in `dtype`); log q = z - log_total, and log p the same of the teacher."""
    numbers = [log_total_Nx1, teacher_log_total_Nx1, weight_Nx1]
    sums_NxL, grad_NxV = _by_tiles(_kl_and_gradient, [z_NxV, teacher_NxV], numbers, [jnp.float32], interpret, dtype)
    return jnp.sum(sums_NxL, axis=-1), grad_NxV


def _by_tiles(body: Any, wide: list, numbers: list, sums: list, interpret: bool, dtype: Any = None) -> list[jax.Array]:
    """`body` over all tiles of the `wide` [N, V] and the `numbers` [N, 1]: arrays [N, LANES], and with a dtype one [N, V]."""
    count, vocab = wide[0].shape
    rows = next(size for size in (ROWS, 128, 64, 32, STRIP) if count % size == 0)
    columns = min(COLUMNS, -(-vocab // LANES) * LANES)
    of_row = lambda width: pl.BlockSpec((rows, width), lambda i, j: (i, 0))
    tile = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    out = [jax.ShapeDtypeStruct((count, LANES), kind) for kind in sums]
    out += [] if dtype is None else [jax.ShapeDtypeStruct((count, vocab), dtype)]
    return pl.pallas_call(
        partial(body, rows, columns, vocab),
        grid=(count // rows, -(-vocab // columns)),
        in_specs=[tile] * len(wide) + [of_row(1)] * len(numbers),
        out_specs=[of_row(LANES)] * len(sums) + [tile] * (dtype is not None),
        out_shape=out,
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
        interpret=interpret,
    )(*wide, *numbers)


def _strips(rows: int, body: Any) -> None:
    jax.lax.fori_loop(0, rows // STRIP, lambda i, _: body(pl.ds(i * STRIP, STRIP)), None)


def _tail(columns: int, vocab: int) -> Any:
    """(x, other) -> x [STRIP, columns] with `other` past the vocabulary's end."""
    if vocab % columns == 0:
        return lambda x, other: x
    place = pl.program_id(1) * columns + jax.lax.broadcasted_iota(jnp.int32, (STRIP, columns), 1)
    return lambda x, other: jnp.where(place < vocab, x, other)


def _of_lanes(x: jax.Array) -> list[jax.Array]:
    return [x[:, start : start + LANES] for start in range(0, x.shape[1], LANES)]


def _at_first(*refs_and_values: tuple[Any, float]) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        for ref, value in refs_and_values:
            ref[...] = jnp.full_like(ref, value)


def _top_and_sum(rows: int, columns: int, vocab: int, z: Any, tops: Any, sums: Any) -> None:
    _at_first((tops, BELOW), (sums, 0.0))
    within = _tail(columns, vocab)

    def strip(own: Any) -> None:
        parts = _of_lanes(within(z[own, :], BELOW))
        before = tops[own, :]
        top = before
        for part in parts:
            top = jnp.maximum(top, part)
        added = [jnp.exp(part - top) for part in parts]
        tops[own, :] = top
        sums[own, :] = sums[own, :] * jnp.exp(before - top) + sum(added[1:], added[0])

    _strips(rows, strip)


def _kl_and_gradient(rows: int, columns: int, vocab: int, z: Any, teacher: Any, *others: Any) -> None:
    log_total, teacher_log_total, weight, sums, grad = others
    _at_first((sums, 0.0))
    within = _tail(columns, vocab)

    def strip(own: Any) -> None:
        log_q, log_p = z[own, :] - log_total[own, :], teacher[own, :] - teacher_log_total[own, :]
        p = jnp.exp(log_p)
        grad[own, :] = ((jnp.exp(log_q) - p) * weight[own, :]).astype(grad.dtype)
        parts = _of_lanes(within(p * (log_p - log_q), 0.0))
        sums[own, :] += sum(parts[1:], parts[0])

    _strips(rows, strip)
