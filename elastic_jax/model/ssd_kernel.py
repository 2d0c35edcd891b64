"""The state-space recurrence of Mamba-2 on TPU: one kernel forward and one backward, with the state kept on the chip.

The same chunked form as `ssd.ssd` (arXiv 2405.21060, section 6). For one head, of a chunk's Q tokens, with S = C Bᵀ:

  y = (S ∘ L) x + f ∘ (C h),      h' = r h + Bᵀ (e ∘ x),      L_qk = exp(l_q - l_k) dt_k within a document and k ≤ q

l is the running sum of dt · a over the chunk, which is made outside by XLA and differentiated there; f = exp(l) takes the state h
before the chunk to a token, e = exp(l_Q - l) dt a token to the chunk's end, r = exp(l_Q) the state there; each is 0 across the
boundary of a document. No array of tokens x tokens leaves the chip. What has one number for a token and head lies with the
tokens along lanes, as rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from elastic_jax.model.ssd_blocks import CHUNK, Blocks, groups_of_a_block
from elastic_jax.model.tiles import LANES, SUBLANES

_BELOW = -1e30  # its exponential is 0


@partial(jax.jit, static_argnames='interpret')  # traced once for all layers of one shape
def ssd_by_kernel(
    x_BxTxGxMxP: jax.Array,
    dt_BxTxGxM: jax.Array,
    a_GxM: jax.Array,
    b_BxTxGxN: jax.Array,
    c_BxTxGxN: jax.Array,
    segment_ids_BxT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """y [B, T, G, M, P] in float32, the first of what `ssd.ssd` returns; for shapes that `ssd_blocks.fits_ssd_kernel` allows."""
    batch, length, groups, heads, channels = x_BxTxGxMxP.shape
    pad = -length % CHUNK
    flat = lambda u: jnp.pad(u.reshape(batch, length, -1), ((0, 0), (0, pad), (0, 0)))
    ids_BxT = jnp.zeros((batch, length), jnp.int32) if segment_ids_BxT is None else segment_ids_BxT
    ids_BxT = jnp.pad(ids_BxT, ((0, 0), (0, pad)), mode='edge')
    blocks = Blocks(groups_of_a_block(groups, heads * channels), heads, channels, b_BxTxGxN.shape[-1], interpret)
    chunks_BxCxQ = ids_BxT.reshape(batch, -1, CHUNK)
    before_BxC = jnp.concatenate([chunks_BxCxQ[:, :1, 0], chunks_BxCxQ[:, :-1, -1]], axis=1)
    before_BxT = jnp.repeat(before_BxC, CHUNK, axis=1)  # the document of the state that a token's chunk begins with

    dt_BxHxT = jnp.swapaxes(flat(dt_BxTxGxM), 1, 2)
    steps = (dt_BxHxT * a_GxM.reshape(-1)[None, :, None]).reshape(batch, groups * heads, -1, CHUNK)
    sums_BxHxT = jnp.cumsum(steps, axis=-1).reshape(dt_BxHxT.shape)
    rows = lambda u: jnp.pad(
        u.reshape(batch, -1, blocks.heads, u.shape[-1]), ((0, 0), (0, 0), (0, blocks.rows - blocks.heads), (0, 0))
    )
    wide = flat(x_BxTxGxMxP), flat(b_BxTxGxN), flat(c_BxTxGxN)
    y_BxTxL = _run(blocks, *wide, rows(sums_BxHxT), rows(dt_BxHxT), ids_BxT[:, None], before_BxT[:, None])
    return y_BxTxL[:, :length].reshape(x_BxTxGxMxP.shape)


def _dot(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Sum over dimension over[0] of x and over[1] of y, in float32."""
    return jax.lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def _within(ids: jax.Array) -> jax.Array:
    """[Q, K]: whether token k is of token q's document and not after it; `ids` [1, K]."""
    q, k = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), dim) for dim in (0, 1))
    return (q >= k) & (jnp.broadcast_to(ids, (SUBLANES, CHUNK)).T[:, :1] == ids)


def _chunk(b, c, ids, blocks: Blocks) -> tuple[jax.Array, dict[int, jax.Array], dict[int, jax.Array], dict[int, jax.Array]]:
    """Who sees whom [Q, K], and of every group B, C [Q, N] and C Bᵀ [Q, K]."""
    parts = {g: slice(g * blocks.state, (g + 1) * blocks.state) for g in range(blocks.groups)}
    bs, cs = ({g: ref[0, :, part] for g, part in parts.items()} for ref in (b, c))
    return _within(ids[0]), bs, cs, {g: _dot(cs[g], bs[g], (1, 1)) for g in parts}


class _Scalars(NamedTuple):
    """l, f, e [rows, Q], r [rows, 1], and e without dt."""

    sums: jax.Array
    start: jax.Array
    end: jax.Array
    carry: jax.Array
    to_end: jax.Array

    def columns(self) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """l, f and e with the tokens down the rows, [Q, rows], and r [1, rows]."""
        carry = jnp.broadcast_to(self.carry, (self.carry.shape[0], LANES)).T[:1]
        return self.sums.T, self.start.T, self.end.T, carry


def _scalars(sums: jax.Array, dt: jax.Array, ids: jax.Array, before: jax.Array) -> _Scalars:
    total, last = sums[:, -1:], ids[:, -1:]
    start = jnp.where(ids == before, jnp.exp(sums), 0.0)
    to_end = jnp.where(ids == last, jnp.exp(total - sums), 0.0)
    carry = jnp.where(last == before[:, -1:], jnp.exp(total), 0.0)
    return _Scalars(sums, start, to_end * dt, carry, to_end)


def _forward_kernel(x, b, c, sums, dt, ids, before, y, *states_and_state, blocks: Blocks) -> None:
    *states, state = states_and_state

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = jnp.zeros_like(state)

    dtype, dt, scalars = x.dtype, dt[0, 0], _scalars(sums[0, 0], dt[0, 0], ids[0], before[0])
    columns, start, end, carry = scalars.columns()
    within, bs, cs, scores = _chunk(b, c, ids, blocks)
    for unit in blocks.units():
        own, lanes = x[0, :, unit.lanes], unit.lanes
        old = state[:, lanes]
        kept = old.astype(dtype)
        if states:
            states[0][0, 0, 0, :, lanes] = kept
        inside = []
        for h in unit.heads:
            weights = scores[unit.group(h)] * _decay(within, columns, scalars.sums, h) * dt[h : h + 1]
            inside.append(_dot(weights.astype(dtype), own, (1, 0)))
        carried = unit.by_group({g: _dot(cs[g], kept, (1, 0)) for g in unit.groups})
        y[0, :, lanes] = unit.pick(inside) + unit.spread(start) * carried
        ended = (own.astype(jnp.float32) * unit.spread(end)).astype(dtype)
        added = unit.by_group({g: _dot(bs[g], ended, (0, 0)) for g in unit.groups})
        state[:, lanes] = unit.spread(carry) * old + added


def _decay(within: jax.Array, columns: jax.Array, rows: jax.Array, head: int) -> jax.Array:
    return jnp.exp(jnp.where(within, columns[:, head : head + 1] - rows[head : head + 1], _BELOW))


def _backward_kernel(
    x, b, c, sums, dt, ids, before, states, dy, dx, db, dc, d_sums, d_dt, d_state, *, blocks: Blocks
) -> None:  # fmt: skip
    """`d_state` is the gradient of the state after the chunk; chunks come from the last to the first."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_state[...] = jnp.zeros_like(d_state)

    dtype, dt, scalars = x.dtype, dt[0, 0], _scalars(sums[0, 0], dt[0, 0], ids[0], before[0])
    columns, start, end, carry = scalars.columns()
    within, bs, cs, scores = _chunk(b, c, ids, blocks)
    # Sums over a head's channels or a chunk's tokens, gathered head by head.
    by_column = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    by_row = jax.lax.broadcasted_iota(jnp.int32, dt.shape, 0)
    d_columns, d_start, d_end = (jnp.zeros(columns.shape, jnp.float32) for _ in range(3))
    d_rows, d_steps, d_carry = (jnp.zeros(dt.shape, jnp.float32) for _ in range(3))
    at_column = lambda h, part: jnp.where(by_column == h, part.sum(axis=1, keepdims=True), 0.0)
    at_row = lambda h, row: jnp.where(by_row == h, row, 0.0)
    d_scores = {g: jnp.zeros((CHUNK, CHUNK), jnp.float32) for g in bs}
    d_b, d_c = ({g: jnp.zeros((CHUNK, blocks.state), jnp.float32) for g in bs} for _ in range(2))
    for unit in blocks.units():
        lanes = unit.lanes
        own, kept, d_after = x[0, :, lanes], states[0, 0, 0, :, lanes], d_state[:, lanes]
        dy_own, d_kept, wide = dy[0, :, lanes], d_after.astype(dtype), own.astype(jnp.float32)
        narrow, inside = dy_own.astype(dtype), []
        for h in unit.heads:
            g, decay = unit.group(h), _decay(within, columns, scalars.sums, h)
            d_weights = _dot(unit.only(narrow, [h]), own, (1, 1))
            d_decay = d_weights * decay
            d_scores[g] = d_scores[g] + d_decay * dt[h : h + 1]
            d_decay = d_decay * scores[g]
            d_step = d_decay.sum(axis=0, keepdims=True)
            d_steps = d_steps + at_row(h, d_step)
            d_rows = d_rows - at_row(h, d_step * dt[h : h + 1])
            d_columns = d_columns + at_column(h, d_decay * dt[h : h + 1])
            inside.append(_dot((scores[g] * decay * dt[h : h + 1]).astype(dtype), narrow, (0, 0)))
        carried = unit.by_group({g: _dot(cs[g], kept, (1, 0)) for g in unit.groups})
        given = unit.by_group({g: _dot(bs[g], d_kept, (1, 0)) for g in unit.groups})
        kept_and_after = (kept.astype(jnp.float32) * d_after).sum(axis=0, keepdims=True)
        for h in unit.heads:
            d_start = d_start + at_column(h, unit.only(dy_own * carried, [h]))
            d_end = d_end + at_column(h, unit.only(wide * given, [h]))
            d_carry = d_carry + at_row(h, unit.only(kept_and_after, [h]).sum(axis=1, keepdims=True))
        to_end = unit.spread(end)
        from_start, ended = (unit.spread(start) * dy_own).astype(dtype), (to_end * wide).astype(dtype)
        for g in unit.groups:
            d_c[g] = d_c[g] + _dot(unit.only_group(from_start, g), kept, (1, 1))
            d_b[g] = d_b[g] + _dot(unit.only_group(ended, g), d_kept, (1, 1))
        dx[0, :, lanes] = (unit.pick(inside) + to_end * given).astype(dtype)
        read = unit.by_group({g: _dot(cs[g], from_start, (0, 0)) for g in unit.groups})
        d_state[:, lanes] = unit.spread(carry) * d_after + read
    for g in bs:
        part, narrow = slice(g * blocks.state, (g + 1) * blocks.state), d_scores[g].astype(dtype)
        dc[0, :, part] = (d_c[g] + _dot(narrow, bs[g], (1, 0))).astype(dc.dtype)
        db[0, :, part] = (d_b[g] + _dot(narrow, cs[g], (0, 0))).astype(db.dtype)
    d_end = d_end.T
    ended = scalars.end * d_end
    d_total = ended.sum(axis=1, keepdims=True) + scalars.carry * d_carry[:, :1]
    is_last = jax.lax.broadcasted_iota(jnp.int32, dt.shape, 1) == CHUNK - 1
    d_sums[0, 0] = d_rows + d_columns.T + scalars.start * d_start.T - ended + jnp.where(is_last, d_total, 0.0)
    d_dt[0, 0] = d_steps + scalars.to_end * d_end


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(blocks: Blocks, *inputs: jax.Array) -> jax.Array:
    return _forward(blocks, inputs, keep=False)[0]


def _run_forward(blocks: Blocks, *inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y, states = _forward(blocks, inputs, keep=True)
    return y, (*inputs, states)


def _forward(blocks: Blocks, inputs: tuple[jax.Array, ...], keep: bool) -> list[jax.Array]:
    grid, specs = _grid(blocks, inputs), _specs(blocks, lambda chunk: chunk)
    batch, parts, chunks = grid
    x, state = inputs[0], (blocks.state, blocks.width)
    y = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    states = jax.ShapeDtypeStruct((batch, parts, chunks, *state), x.dtype)
    call = pl.pallas_call(
        partial(_forward_kernel, blocks=blocks),
        grid=grid,
        in_specs=specs[:-1],
        out_specs=[specs[0], specs[-1]] if keep else [specs[0]],
        out_shape=[y, states] if keep else [y],
        scratch_shapes=[pltpu.VMEM(state, jnp.float32)],
        compiler_params=_ORDER,
        interpret=blocks.interpret,
        name='ssd_forward',
    )
    return call(*inputs)


def _run_backward(blocks: Blocks, saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array | None, ...]:
    *inputs, _ = saved
    grid = _grid(blocks, inputs)
    specs = _specs(blocks, lambda chunk: grid[2] - 1 - chunk)
    shapes = [jax.ShapeDtypeStruct(u.shape, u.dtype) for u in inputs[:5]]
    call = pl.pallas_call(
        partial(_backward_kernel, blocks=blocks),
        grid=grid,
        in_specs=[*specs, specs[0]],
        out_specs=specs[:5],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((blocks.state, blocks.width), jnp.float32)],
        compiler_params=_ORDER,
        interpret=blocks.interpret,
        name='ssd_backward',
    )
    return (*call(*saved, dy), None, None)


_run.defvjp(_run_forward, _run_backward)
# Sequences and groups may be shared between a chip's cores; chunks follow each other.
_ORDER = pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary'))


def _grid(blocks: Blocks, inputs: Sequence[jax.Array]) -> tuple[int, int, int]:
    batch, length, width = inputs[0].shape
    return batch, width // blocks.width, length // CHUNK


def _specs(blocks: Blocks, order: jax.typing.ArrayLike) -> list[pl.BlockSpec]:
    """Blocks of the inputs of the forward pass and of the kept states; `order` says which chunk is the n-th."""
    wide = lambda size: pl.BlockSpec((1, CHUNK, size), lambda i, j, n: (i, order(n), j))
    rows = pl.BlockSpec((1, 1, blocks.rows, CHUNK), lambda i, j, n: (i, j, 0, order(n)))
    row = pl.BlockSpec((1, 1, CHUNK), lambda i, j, n: (i, 0, order(n)))
    states = pl.BlockSpec((1, 1, 1, blocks.state, blocks.width), lambda i, j, n: (i, j, order(n), 0, 0))
    channels = blocks.groups * blocks.state
    return [wide(blocks.width), wide(channels), wide(channels), rows, rows, row, row, states]
