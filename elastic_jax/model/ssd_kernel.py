"""The state-space recurrence of Mamba-2 on TPU: one kernel forward and one backward, with the state kept on the chip.

The same chunked form as `ssd.ssd` (arXiv 2405.21060, section 6). For one head, of a chunk's Q tokens, with S = C Bᵀ:

  y = (S ∘ L) x + f ∘ (C h),      h' = r h + Bᵀ (e ∘ x),      L_qk = exp(l_q - m_k) within a document and k ≤ q

l is the running sum of dt · a over the chunk, which is made outside by XLA and differentiated there, and m = l - ln dt.
f = exp(l) takes the state h before the chunk to a token, e = exp(l_Q - m) a token to the chunk's end, r = exp(l_Q) the state
there; each is 0 across the boundary of a document. No array of tokens x tokens leaves the chip. What has one number for a token
and head lies with the tokens along lanes, as rows.

The gradients of l and dt need no sums over tokens x tokens. A token's y is exp(l) times what does not depend on its l, and what
it gives to others, x · dx, is dt exp(-l) times what does not depend on its own l or dt. So with sums over a head's channels
dl = y · dy - x · dx, and ddt = x · dx / dt, l held; at the chunk's end dl has also what e and r give. A token's part in its own y
stands on both sides of that difference, which is taken channel by channel before anything is rounded.
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
from elastic_jax.model.tiles import BELOW, LANES, MEMORY, SUBLANES, dot

_SHORTEST = 1e-20  # a step of zero length has a logarithm, and a gradient


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
    blocks = Blocks(groups_of_a_block(batch, groups, heads * channels), heads, channels, b_BxTxGxN.shape[-1], interpret)
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


def _column(row: jax.Array) -> jax.Array:
    """[1, Q] -> [Q, 1]."""
    return jnp.broadcast_to(row, (SUBLANES, CHUNK)).T[:, :1]


def _sees(ids: jax.Array, later: int) -> jax.Array:
    """[Q, Q]: whether the token of dimension `later` is of the other's document and not before it; `ids` [1, Q]."""
    q, k = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), dim) for dim in (later, 1 - later))
    return (q >= k) & (_column(ids) == ids)


def _of_groups(ref, blocks: Blocks) -> dict[int, jax.Array]:
    """B or C of every group, [Q, N]."""
    return {g: ref[0, :, g * blocks.state : (g + 1) * blocks.state] for g in range(blocks.groups)}


class _Scalars(NamedTuple):
    """l, m, f and e as rows [heads, Q], and r [1, heads]."""

    sums: jax.Array
    less_step: jax.Array
    start: jax.Array
    end: jax.Array
    carry: jax.Array


def _scalars(sums: jax.Array, dt: jax.Array, ids: jax.Array, before: jax.Array) -> _Scalars:
    total, last = sums[:, -1:], ids[:, -1:]
    less_step = sums - jnp.log(jnp.maximum(dt, _SHORTEST))
    start = jnp.where(ids == before, jnp.exp(sums), 0.0)
    end = jnp.where(ids == last, jnp.exp(total - less_step), 0.0)
    carry = jnp.where(last == before[:, -1:], jnp.exp(total), 0.0)
    return _Scalars(sums, less_step, start, end, jnp.broadcast_to(carry, (len(carry), LANES)).T[:1])


def _forward_kernel(x, b, c, sums, dt, ids, before, y, *states_and_state, blocks: Blocks) -> None:
    *states, state = states_and_state

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state[...] = jnp.zeros_like(state)

    dtype, scalars = x.dtype, _scalars(sums[0, 0], dt[0, 0], ids[0], before[0])
    within, begins = _sees(ids[0], later=0), _column(jnp.where(ids[0] == before[0], 1.0, 0.0)) > 0
    columns, bs, cs = scalars.sums.T, _of_groups(b, blocks), _of_groups(c, blocks)
    scores = {g: dot(cs[g], bs[g], (1, 1)) for g in bs}
    turned = {g: bs[g].astype(jnp.float32).T for g in bs}
    for unit in blocks.units():
        lanes = unit.lanes
        own, old = x[0, :, lanes], state[:, lanes]
        kept = old.astype(dtype)
        if states:
            states[0][0, 0, 0, :, lanes] = kept
        # Spreading a column over lanes is slow, so one serves twice; what x gives to the chunk's tokens and to the state is one
        # matmul.
        spread, both = [], []
        for h in unit.heads:
            g = unit.group(h)
            spread.append(jnp.broadcast_to(columns[:, h : h + 1], (CHUNK, CHUNK)))
            decay = jnp.exp(jnp.where(within, spread[-1] - scalars.less_step[h : h + 1], BELOW))
            rows = (scores[g] * decay).astype(dtype), (turned[g] * scalars.end[h : h + 1]).astype(dtype)
            both.append(dot(jnp.concatenate(rows, axis=0), own, (1, 0)))
        inside, added = unit.pick([part[:CHUNK] for part in both]), unit.pick([part[CHUNK:] for part in both])
        start = jnp.where(begins, jnp.exp(unit.pick([unit.fill(column) for column in spread])), 0.0)
        carried = unit.by_group({g: dot(cs[g], kept, (1, 0)) for g in unit.groups})
        y[0, :, lanes] = inside + start * carried
        state[:, lanes] = unit.spread(scalars.carry) * old + added


def _backward_kernel(
    x, b, c, sums, dt, ids, before, states, y, dy, dx, db, dc, d_sums, d_dt,
    d_state, d_kept, dy_start, x_end, d_moved, d_rest, d_stepped, *, blocks: Blocks,
) -> None:  # fmt: skip
    """Chunks come from the last to the first. `d_state` is the gradient of the state after the chunk, in float32, `d_kept` what
    matmuls take of it; `dy_start` is f ∘ dy, `x_end` e ∘ x, and `d_moved` and `d_stepped` have what is summed for dl and ddt.
    """

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        d_state[...] = jnp.zeros_like(d_state)

    dtype, scalars = x.dtype, _scalars(sums[0, 0], dt[0, 0], ids[0], before[0])
    # Tokens x tokens stand the other way about than forward, [K, Q], as no matmul then has to turn one.
    within, bs, cs = _sees(ids[0], later=1), _of_groups(b, blocks), _of_groups(c, blocks)
    columns, starts, ends = scalars.less_step.T, scalars.start.T, scalars.end.T
    scores = {g: dot(bs[g], cs[g], (1, 1)) for g in bs}
    turned = {g: cs[g].T for g in bs}
    d_scores = {g: jnp.zeros((CHUNK, CHUNK), jnp.float32) for g in bs}
    by_row = jax.lax.broadcasted_iota(jnp.int32, dt.shape[2:], 0)
    d_total = jnp.zeros(dt.shape[2:], jnp.float32)
    for unit in blocks.units():
        lanes = unit.lanes
        kept, d_after, dy_own, wide = (
            states[0, 0, 0, :, lanes],
            d_state[:, lanes],
            dy[0, :, lanes],
            x[0, :, lanes].astype(jnp.float32),
        )
        narrow = dy_own.astype(dtype)
        d_kept[:, lanes] = d_after.astype(dtype)
        apart = jnp.concatenate([unit.only(wide, h) for h in unit.heads], axis=0)
        d_weights, inside = dot(apart.astype(dtype), narrow, (1, 1)), []
        for n, h in enumerate(unit.heads):
            g = unit.group(h)
            decay = jnp.exp(jnp.where(within, scalars.sums[h : h + 1] - columns[:, h : h + 1], BELOW))
            d_scores[g] = d_scores[g] + d_weights[n * CHUNK : (n + 1) * CHUNK] * decay
            inside.append(dot((scores[g] * decay).astype(dtype), narrow, (1, 0)))
        dy_start[:, lanes] = (unit.spread(starts) * dy_own).astype(dtype)
        read = unit.by_group({g: dot(turned[g], dy_start[:, lanes], (1, 0)) for g in unit.groups})
        carry, to_end = unit.spread(scalars.carry), unit.spread(ends)
        d_state[:, lanes] = carry * d_after + read
        given = to_end * unit.by_group({g: dot(bs[g], d_kept[:, lanes], (1, 0)) for g in unit.groups})
        x_end[:, lanes] = (to_end * wide).astype(dtype)
        d_own = unit.pick(inside) + given
        dx[0, :, lanes] = d_own.astype(dtype)
        d_step = wide * d_own
        moved = y[0, :, lanes] * narrow.astype(jnp.float32) - d_step
        rounded = moved.astype(dtype)
        d_moved[:, lanes] = rounded
        d_rest[:, lanes] = (moved - rounded.astype(jnp.float32)).astype(dtype)
        d_stepped[:, lanes] = d_step.astype(dtype)
        ended = (wide * given).sum(axis=0, keepdims=True)
        ended = ended + carry * (kept.astype(jnp.float32) * d_after).sum(axis=0, keepdims=True)
        for h in unit.heads:
            d_total = d_total + jnp.where(by_row == h, unit.only(ended, h).sum(axis=1, keepdims=True), 0.0)
    for g in bs:
        states_of, lanes = slice(g * blocks.state, (g + 1) * blocks.state), blocks.lanes_of(g)
        narrow = jnp.where(within, d_scores[g], 0.0).astype(dtype)
        d_c = dot(dy_start[:, lanes], states[0, 0, 0, :, lanes], (1, 1)) + dot(narrow.T, bs[g], (1, 0))
        d_b = dot(x_end[:, lanes], d_kept[:, lanes], (1, 1)) + dot(narrow, cs[g], (1, 0))
        dc[0, :, states_of], db[0, :, states_of] = d_c.astype(dc.dtype), d_b.astype(db.dtype)
    # A matmul by ones sums over a head's lanes; few rows of them pass through it.
    head = jax.lax.broadcasted_iota(jnp.int32, (dt.shape[2], blocks.width), 0)
    first = jax.lax.broadcasted_iota(jnp.int32, head.shape, 1) - head * blocks.channels
    ones = jnp.where((first >= 0) & (first < blocks.channels), 1.0, 0.0).astype(dtype)
    is_last = jax.lax.broadcasted_iota(jnp.int32, dt.shape[2:], 1) == CHUNK - 1
    of_heads = lambda part: dot(ones, part[...], (1, 1))
    d_sums[0, 0] = of_heads(d_moved) + of_heads(d_rest) + jnp.where(is_last, d_total, 0.0)
    d_dt[0, 0] = of_heads(d_stepped) / jnp.maximum(dt[0, 0], _SHORTEST)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(blocks: Blocks, *inputs: jax.Array) -> jax.Array:
    return _forward(blocks, inputs, keep=False)[0]


def _run_forward(blocks: Blocks, *inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y, states = _forward(blocks, inputs, keep=True)
    return y, (*inputs, states, y)


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
    *inputs, _, _ = saved
    grid, x, state = _grid(blocks, inputs), inputs[0], (blocks.state, blocks.width)
    specs = _specs(blocks, lambda chunk: grid[2] - 1 - chunk)
    shapes = [jax.ShapeDtypeStruct(u.shape, u.dtype) for u in inputs[:5]]
    call = pl.pallas_call(
        partial(_backward_kernel, blocks=blocks),
        grid=grid,
        in_specs=[*specs, specs[0], specs[0]],
        out_specs=specs[:5],
        out_shape=shapes,
        scratch_shapes=[
            pltpu.VMEM(state, jnp.float32),
            pltpu.VMEM(state, x.dtype),
            *[pltpu.VMEM((CHUNK, blocks.width), x.dtype)] * 5,
        ],
        compiler_params=_ORDER,
        interpret=blocks.interpret,
        name='ssd_backward',
    )
    return (*call(*saved, dy), None, None)


_run.defvjp(_run_forward, _run_backward)
# Sequences and groups may be shared between a chip's cores; chunks follow each other.
_ORDER = pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=MEMORY)


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
