"""The state-space recurrence of Mamba-2 on NVIDIA GPUs: the chunked form of `ssd.ssd` as a chain of Triton kernels.

For one head, of a chunk's Q tokens, with S = C Bᵀ and x̂ = dt x (arXiv 2405.21060, section 6):

  y = (S ∘ L) x̂ + f ∘ (C h),      h' = r h + Bᵀ (e ∘ x̂),      L_qk = exp(l_q - l_k) within a document and k ≤ q

l is the running sum of dt · a over the chunk, which is made outside by XLA and differentiated there; f, e and r, from
`ssd.crossing`, take the state h before the chunk to a token, a token to the chunk's end, and the state there.

Programs of a GPU's grid come in no order, so one kernel passes states on and another takes all chunks at once. The first needs
no matmul but the state's own: every block [N', P'] of a head's state is a recurrence by itself, whose program goes through the
chunks with it in registers. That gives as many programs as the chip has places, and states are written once, where a kernel of
all chunks' states and a scan over them would write them twice and read them once more. It runs once more for gradients, from the
last chunk to the first, as the gradient of a state is D = r D' + Cᵀ (f ∘ dy), D' that of the state after the chunk. With
u = (S ∘ L)ᵀ dy + e ∘ (B D'), the gradient of x̂,

  dx = dt u,      d dt = Σ_p x u,      dl = Σ_p (y dy - x̂ u),      and for the chunk's last token + Σ_np h' D'

where y is proportional to exp(l) and what a token adds to exp(-l). A token's own part, which does not depend on l, stands in both
products with one rounding, and cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from elastic_jax.model.ssd import crossing
from elastic_jax.model.tiles import BELOW, dot
from elastic_jax.model.triton import plgpu

CHUNK = 64  # with 128, the squares of tokens alone would fill half of a program's registers
BLOCK = 64  # states or channels of a block that is passed on
STATE = 2**14  # numbers of a head's state that find room
HEADS = 8  # at most so many of a group in one program, which share S


def fits_ssd_triton(shape_BxTxGxMxP: tuple[int, ...], state: int) -> bool:
    """Whether there are kernels for x of this shape: tiles are powers of two, of which a head's state finds room on the chip."""
    length, channels = shape_BxTxGxMxP[1], shape_BxTxGxMxP[-1]
    tile = lambda size, most: 16 <= size <= most and size & (size - 1) == 0
    return plgpu is not None and length >= CHUNK and tile(channels, 128) and tile(state, 256) and channels * state <= STATE


@partial(jax.jit, static_argnames='interpret')  # traced once for all layers of one shape
def ssd_by_triton(
    x_BxTxGxMxP: jax.Array,
    dt_BxTxGxM: jax.Array,
    a_GxM: jax.Array,
    b_BxTxGxN: jax.Array,
    c_BxTxGxN: jax.Array,
    segment_ids_BxT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """y [B, T, G, M, P] in float32, the first of what `ssd.ssd` returns; for shapes that `fits_ssd_triton` allows."""
    batch, length = x_BxTxGxMxP.shape[:2]
    pad = lambda u, mode='constant': jnp.pad(u, [(0, 0), (0, -length % CHUNK)] + [(0, 0)] * (u.ndim - 2), mode=mode)
    ids_BxT = jnp.zeros((batch, length), jnp.int32) if segment_ids_BxT is None else segment_ids_BxT
    ids_BxCxQ = pad(ids_BxT, 'edge').reshape(batch, -1, CHUNK)
    x_BxTxGxMxP, dt_BxTxGxM, b_BxTxGxN, c_BxTxGxN = map(pad, (x_BxTxGxMxP, dt_BxTxGxM, b_BxTxGxN, c_BxTxGxN))
    # What has one number for a token and head lies with a chunk's tokens together.
    dt_BxCxGxMxQ = jnp.moveaxis(dt_BxTxGxM.reshape(*ids_BxCxQ.shape, *dt_BxTxGxM.shape[2:]), 2, -1)
    sums_BxCxGxMxQ = jnp.cumsum(dt_BxCxGxMxQ * a_GxM[None, None, ..., None], axis=-1)
    y_BxTxGxMxP = _run(interpret, x_BxTxGxMxP, dt_BxCxGxMxQ, sums_BxCxGxMxQ, b_BxTxGxN, c_BxTxGxN, ids_BxCxQ)
    return y_BxTxGxMxP[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(interpret: bool, *inputs: jax.Array) -> jax.Array:
    return _run_forward(interpret, *inputs)[0]


def _run_forward(interpret: bool, *inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x, dt, sums, b, c, ids = inputs
    start, end, carry = crossing(sums, ids)
    states = _pass_on(b, x, end * dt, carry, None, x.dtype, interpret)[0]
    of = _Blocks.of(x, b.shape[-1])
    given = [(x, of.heads), (b, of.group), (c, of.group), *_each((dt, sums, start), of.rows), (ids, of.ids), (states, of.states)]
    (y,) = _by_chunk(
        'ssd_outputs', _output_kernel, of, given, [(jax.ShapeDtypeStruct(x.shape, jnp.float32), of.heads)], interpret
    )
    return y, (*inputs, states, y)


def _run_backward(interpret: bool, saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array | None, ...]:
    x, dt, sums, b, c, ids, states, y = saved
    start, end, carry = crossing(sums, ids)
    after, ended_BxCxGxM = _pass_on(c, dy, start, carry, states, x.dtype, interpret)
    of = _Blocks.of(x, b.shape[-1])
    given = [(x, of.heads), (dy, of.heads), (b, of.group), (c, of.group), (ids, of.ids), *_each((dt, sums, end), of.rows)]
    own = [(x, of.heads), (dt, of.rows), (sums, of.rows)]
    of_heads = [*given, (after, of.states), (y, of.heads)]
    dx, d_dt, d_sums = _by_chunk('ssd_head_gradients', _head_gradient_kernel, of, of_heads, own, interpret)
    parts = x.shape[3] // _together(x.shape[3])
    shares = [(jax.ShapeDtypeStruct((*b.shape[:3], parts, b.shape[-1]), jnp.float32), of.shares)] * 2
    of_group = [*given, (start, of.rows), (states, of.states), (after, of.states)]
    db, dc = _by_chunk('ssd_group_gradients', _group_gradient_kernel, of, of_group, shares, interpret)
    narrow = lambda u: u.sum(axis=3).astype(b.dtype)
    return dx, d_dt, d_sums.at[..., -1].add(ended_BxCxGxM), narrow(db), narrow(dc), None


_run.defvjp(_run_forward, _run_backward)


def _scaled(x: jax.Array, rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return (x.astype(jnp.float32) * rows[:, None]).astype(dtype)


def _pass_on(
    keys_BxTxGxN: jax.Array,
    values_BxTxGxMxP: jax.Array,
    weights_BxCxGxMxQ: jax.Array,
    carry_BxCxGxM: jax.Array,
    states: jax.Array | None,
    dtype: jnp.dtype,
    interpret: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """What stands at the edges of chunks [B, C, G, M, N, P] when each makes carry · s + keysᵀ (weights ∘ values) of it.

    Without `states` those are the states before every chunk. With them chunks go from the last to the first: the gradients of
    the states after every chunk, and each one's sum of products with that state, [B, C, G, M].
    """
    batch, length, groups, heads, channels = values_BxTxGxMxP.shape
    chunks, size = length // CHUNK, keys_BxTxGxN.shape[-1]
    rows, columns = min(size, BLOCK), min(channels, BLOCK)
    grid = groups * heads, (size // rows) * (channels // columns), batch
    head = lambda h: (jax.lax.div(h, heads), jax.lax.rem(h, heads))
    part = lambda n: (jax.lax.div(n, channels // columns), jax.lax.rem(n, channels // columns))
    edges = pl.BlockSpec((None, chunks, None, None, rows, columns), lambda h, n, i: (i, 0, *head(h), *part(n)))
    specs = [
        pl.BlockSpec((None, length, None, rows), lambda h, n, i: (i, 0, head(h)[0], part(n)[0])),
        pl.BlockSpec((None, length, None, None, columns), lambda h, n, i: (i, 0, *head(h), part(n)[1])),
        pl.BlockSpec((None, chunks, None, None, CHUNK), lambda h, n, i: (i, 0, *head(h), 0)),
        pl.BlockSpec((None, chunks, None, None), lambda h, n, i: (i, 0, *head(h))),
    ]
    out_specs, out_shape = [edges], [jax.ShapeDtypeStruct((batch, chunks, groups, heads, size, channels), dtype)]
    inputs = [keys_BxTxGxN, values_BxTxGxMxP, weights_BxCxGxMxQ, carry_BxCxGxM]
    if states is not None:
        out_specs.append(pl.BlockSpec((None, chunks, None, None, None), lambda h, n, i: (i, 0, *head(h), n)))
        out_shape.append(jax.ShapeDtypeStruct((batch, chunks, groups, heads, grid[1]), jnp.float32))
        specs, inputs = [*specs, edges], [*inputs, states]
    edge, *products = pl.pallas_call(
        partial(_pass_kernel, chunks=chunks, backward=states is not None),
        grid=grid,
        in_specs=specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name='ssd_states',
    )(*inputs)
    return edge, products[0].sum(axis=-1) if products else None


def _pass_kernel(keys, values, weights, carry, *rest: Any, chunks: int, backward: bool) -> None:
    states, edge, products = rest if backward else (None, *rest, None)
    dtype = keys.dtype

    def chunk(n: jax.Array, s: jax.Array) -> jax.Array:
        n = chunks - 1 - n if backward else n
        tokens = pl.ds(n * CHUNK, CHUNK)
        edge[n] = s.astype(edge.dtype)
        if backward:
            products[n] = jnp.sum(s * states[jnp.minimum(n + 1, chunks - 1)].astype(jnp.float32))
        return carry[n] * s + dot(keys[tokens], _scaled(values[tokens], weights[n], dtype), (0, 0))

    jax.lax.fori_loop(0, chunks, chunk, jnp.zeros(edge.shape[1:], jnp.float32))


def _together(heads: int) -> int:
    """Heads of a group that one program takes."""
    return next(m for m in range(min(heads, HEADS), 0, -1) if heads % m == 0)


class _Blocks(NamedTuple):
    """What a program of a chunk and some heads of a group has of each kind of array, and the grid of such programs."""

    grid: tuple[int, int, int]
    heads: pl.BlockSpec  # [B, T, G, M, P]
    group: pl.BlockSpec  # [B, T, G, N]
    rows: pl.BlockSpec  # [B, C, G, M, Q]
    ids: pl.BlockSpec  # [B, C, Q]
    states: pl.BlockSpec  # [B, C, G, M, N, P]
    shares: pl.BlockSpec  # [B, T, G, parts of M, N]
    warps: int

    @classmethod
    def of(cls, x_BxTxGxMxP: jax.Array, state: int) -> _Blocks:
        batch, length, groups, heads, channels = x_BxTxGxMxP.shape
        some = _together(heads)
        parts = heads // some
        place = lambda j: (jax.lax.div(j, parts), jax.lax.rem(j, parts))
        return cls(
            (length // CHUNK, groups * parts, batch),
            pl.BlockSpec((None, CHUNK, None, some, channels), lambda n, j, i: (i, n, *place(j), 0)),
            pl.BlockSpec((None, CHUNK, None, state), lambda n, j, i: (i, n, place(j)[0], 0)),
            pl.BlockSpec((None, None, None, some, CHUNK), lambda n, j, i: (i, n, *place(j), 0)),
            pl.BlockSpec((None, None, CHUNK), lambda n, j, i: (i, n, 0)),
            pl.BlockSpec((None, None, None, some, state, channels), lambda n, j, i: (i, n, *place(j), 0, 0)),
            pl.BlockSpec((None, CHUNK, None, None, state), lambda n, j, i: (i, n, *place(j), 0)),
            4 if channels * state * x_BxTxGxMxP.dtype.itemsize <= 2**14 else 8,  # by what ptxas can keep in registers
        )


def _each(arrays: Sequence[jax.Array], spec: pl.BlockSpec) -> list[tuple[jax.Array, pl.BlockSpec]]:
    return [(u, spec) for u in arrays]


def _by_chunk(
    name: str,
    kernel: Callable[..., None],
    blocks: _Blocks,
    given: Sequence[tuple[jax.Array, pl.BlockSpec]],
    made: Sequence[tuple[Any, pl.BlockSpec]],
    interpret: bool,
) -> list[jax.Array]:
    """A program for every chunk and some heads of a group; arrays and what is like those to be made, with their blocks."""
    return pl.pallas_call(
        kernel,
        grid=blocks.grid,
        in_specs=[spec for _, spec in given],
        out_specs=[spec for _, spec in made],
        out_shape=[jax.ShapeDtypeStruct(u.shape, u.dtype) for u, _ in made],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=2),
        interpret=interpret,
        name=name,
    )(*(u for u, _ in given))


def _parts(size: int) -> list[pl.Slice]:
    """Of N states, as many at a time as a matmul takes."""
    return [pl.ds(n, min(size, BLOCK)) for n in range(0, size, BLOCK)]


def _scores(b, c) -> jax.Array:
    """S [Q, K]."""
    return sum(dot(c[:, part], b[:, part], (1, 1)) for part in _parts(b.shape[-1]))


def _decay(ids) -> Callable[[jax.Array], jax.Array]:
    """L [Q, K] of a head's l."""
    q, k = (jax.lax.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), dim) for dim in (0, 1))
    own = ids[...]
    within = (q >= k) & (own[:, None] == own[None, :])
    return lambda sums: jnp.exp(jnp.where(within, sums[:, None] - sums[None, :], BELOW))


def _output_kernel(x, b, c, dt, sums, start, ids, states, y) -> None:
    dtype, scores, decay = x.dtype, _scores(b, c), _decay(ids)

    def head(h: jax.Array, _: int) -> int:
        carried = sum(dot(c[:, part], states[h, part], (1, 0)) for part in _parts(b.shape[-1]))
        inside = dot((scores * decay(sums[h])).astype(dtype), _scaled(x[:, h], dt[h], dtype), (1, 0))
        y[:, h] = inside + start[h][:, None] * carried
        return _

    jax.lax.fori_loop(0, x.shape[1], head, 0)


def _head_gradient_kernel(x, dy, b, c, ids, dt, sums, end, after, y, dx, d_dt, d_sums) -> None:
    """`after` is the gradient of the state after the chunk; of l, what its last token has of that state is left out."""
    dtype, scores, decay = x.dtype, _scores(b, c), _decay(ids)

    def head(h: jax.Array, _: int) -> int:
        own_dt, own, narrow = dt[h], x[:, h], dy[:, h].astype(dtype)
        given = sum(dot(b[:, part], after[h, part], (1, 0)) for part in _parts(b.shape[-1]))
        u = dot((scores * decay(sums[h])).astype(dtype), narrow, (0, 0)) + end[h][:, None] * given
        dx[:, h] = (own_dt[:, None] * u).astype(dx.dtype)
        d_dt[h] = jnp.sum(own.astype(jnp.float32) * u, axis=1)
        scaled = _scaled(own, own_dt, dtype).astype(jnp.float32)  # rounded as in y, or a token's own part would not cancel
        d_sums[h] = jnp.sum(y[:, h] * narrow.astype(jnp.float32) - scaled * u, axis=1)
        return _

    jax.lax.fori_loop(0, x.shape[1], head, 0)


def _group_gradient_kernel(x, dy, b, c, ids, dt, sums, end, start, states, after, db, dc) -> None:
    """The share of B's and C's gradients that these heads of a group have."""
    dtype, decay, heads = x.dtype, _decay(ids), x.shape[1]

    def inside(h: jax.Array, d_scores: jax.Array) -> jax.Array:
        return d_scores + decay(sums[h]) * dot(dy[:, h].astype(dtype), _scaled(x[:, h], dt[h], dtype), (1, 1))

    d_scores = jax.lax.fori_loop(0, heads, inside, jnp.zeros((CHUNK, CHUNK), jnp.float32)).astype(dtype)
    for part in _parts(b.shape[-1]):

        def across(h: jax.Array, both: tuple[jax.Array, jax.Array], part: pl.Slice = part) -> tuple[jax.Array, jax.Array]:
            d_b, d_c = both
            ended, begun = _scaled(x[:, h], end[h] * dt[h], dtype), _scaled(dy[:, h], start[h], dtype)
            return d_b + dot(ended, after[h, part], (1, 1)), d_c + dot(begun, states[h, part], (1, 1))

        own = dot(d_scores, c[:, part], (0, 0)), dot(d_scores, b[:, part], (1, 0))
        db[:, part], dc[:, part] = jax.lax.fori_loop(0, heads, across, own)
