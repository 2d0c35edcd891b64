"""The convolution of Mamba-2 and its SiLU on TPU: one kernel forward and one backward, memory read once.

As shifts of an array, XLA pads, keeps and relayouts it for every tap. Here a tile's rows lie in on-chip memory as float32, which
loads them at any row; a lane is a channel. The gradient of an input comes from the tokens after it, so backward goes from the
last tile to the first and hands the first rows of each to the tile before.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from elastic_jax.model.tiles import LANES, SUBLANES, sigmoid

STRIP = 64  # the rows of a strip, whose values stay in registers
HALO = 16  # rows of the tile before that a tile reads: a tile of bfloat16
ROWS, WIDTH = 512, 512  # of a tile


def fits_conv_kernel(shape_BxTxC: tuple[int, ...], taps: int) -> bool:
    """Whether the tokens and channels of this shape are whole tiles, and the rows before a tile hold all taps."""
    _, length, *channels = shape_BxTxC
    return length % LANES == 0 and math.prod(channels) % LANES == 0 and taps <= SUBLANES


@partial(jax.jit, static_argnames=('users', 'interpret'))  # traced once for all layers of one shape
def conv_silu_by_kernel(
    u_BxTxC: jax.Array,
    kernel_KxC: jax.Array,
    bias_C: jax.Array | None,
    segment_ids_BxT: jax.Array | None,
    users: int = 1,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """silu of `conv.causal_conv` without a past, once for each of `users`, whose gradients the kernel adds up as it reads them;
    C may be several dimensions, as there.
    """
    batch, length, *channels = u_BxTxC.shape
    taps = kernel_KxC.shape[0]
    flat = lambda x: x.reshape(*x.shape[: x.ndim - len(channels)], -1)
    bias_C = jnp.zeros(channels) if bias_C is None else bias_C
    ids_BxT = jnp.zeros((batch, length), jnp.int32) if segment_ids_BxT is None else segment_ids_BxT
    before = jnp.pad(ids_BxT, ((0, 0), (taps - 1, 0)), constant_values=-1)
    same = sum((before[:, taps - 1 - s : taps - 1 - s + length] == ids_BxT) * (1 << s) for s in range(taps))
    # On all lanes, which as one number for a token it would take in memory as well.
    same_BxTxL = jnp.broadcast_to(same.astype(jnp.int32)[..., None], (*same.shape, LANES))
    wide = lambda x: flat(x).astype(jnp.float32)
    found = _conv_silu(interpret, users, flat(u_BxTxC), wide(kernel_KxC), wide(bias_C)[None], same_BxTxL)
    return tuple(y_BxTxC.reshape(u_BxTxC.shape) for y_BxTxC in found)


class _Tiles:
    """The grid and its blocks: channels, then sequences, then tiles of tokens, in their order or from the last to the first."""

    def __init__(self, shape: tuple[int, int, int], taps: int, reverse: bool):
        batch, length, channels = shape
        self.rows = next(size for size in (ROWS, 256, LANES) if length % size == 0)
        self.width = next(size for size in (WIDTH, 256, LANES) if channels % size == 0)
        count, per_tile = length // self.rows, self.rows // HALO
        self.grid, self.taps = (channels // self.width, batch, count), taps
        at = lambda t: count - 1 - t if reverse else t
        self.own = pl.BlockSpec((1, self.rows, self.width), lambda c, b, t: (b, at(t), c))
        self.before = pl.BlockSpec((1, HALO, self.width), lambda c, b, t: (b, jnp.maximum(at(t) * per_tile - 1, 0), c))
        self.same = pl.BlockSpec((1, self.rows, LANES), lambda c, b, t: (b, at(t), 0))
        self.of_channel = lambda rows: pl.BlockSpec((rows, self.width), lambda c, b, t: (0, c))

    def lanes(self) -> list[slice]:
        return [slice(start, start + LANES) for start in range(0, self.width, LANES)]

    def strips(self, body: Any, carry: Any = None) -> Any:
        """`body` (first row, carry) of every strip."""
        return jax.lax.fori_loop(0, self.rows // STRIP, lambda i, carry: body(i * STRIP, carry), carry, unroll=True)

    def call(
        self, body: Any, interpret: bool, inputs: list, in_specs: list, out_shape: list, out_specs: list, scratch: list
    ) -> Any:
        return pl.pallas_call(
            partial(body, self), grid=self.grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape,
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch], interpret=interpret,
            compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary', 'arbitrary')),
        )(*inputs)  # fmt: skip


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv_silu(
    interpret: bool, users: int, u: jax.Array, kernel: jax.Array, bias: jax.Array, same: jax.Array
) -> tuple[jax.Array, ...]:
    tiles = _Tiles(u.shape, len(kernel), reverse=False)
    specs = [tiles.own, tiles.before, tiles.of_channel(len(kernel)), tiles.of_channel(1), tiles.same]
    out = [jax.ShapeDtypeStruct(u.shape, u.dtype)]
    scratch = [(HALO + tiles.rows, LANES)]
    y = tiles.call(_forward_kernel, interpret, [u, u, kernel, bias, same], specs, out, [tiles.own], scratch)[0]
    return (y,) * users


def _forward(interpret: bool, users: int, *args: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    return _conv_silu(interpret, users, *args), args


def _backward(interpret: bool, users: int, residuals: tuple[jax.Array, ...], y_grads: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    u, kernel, bias, same = residuals
    taps = len(kernel)
    tiles = _Tiles(u.shape, taps, reverse=True)
    specs = [tiles.own, tiles.before, tiles.of_channel(taps), tiles.of_channel(1), tiles.same, *[tiles.own] * users]
    sums = (taps + 1) * SUBLANES
    out = [jax.ShapeDtypeStruct(u.shape, u.dtype), jax.ShapeDtypeStruct((sums, u.shape[-1]), jnp.float32)]
    of_tile, of_next = (HALO + tiles.rows, LANES), (tiles.width // LANES, taps, SUBLANES, LANES)
    scratch = [of_tile, (taps, tiles.rows + SUBLANES, LANES), of_next]
    inputs = [u, u, kernel, bias, same, *(y_grad.astype(u.dtype) for y_grad in y_grads)]
    u_grad, sums = tiles.call(
        partial(_backward_kernel, users), interpret, inputs, specs, out, [tiles.own, tiles.of_channel(sums)], scratch
    )
    of_tap = sums.reshape(taps + 1, SUBLANES, -1).sum(axis=1)
    return u_grad, of_tap[:taps][::-1], of_tap[taps:], np.zeros(same.shape, jax.dtypes.float0)


_conv_silu.defvjp(_forward, _backward)


def _load(tiles: _Tiles, u: Any, before: Any, lanes: slice, held: Any) -> None:
    """A tile's lanes, after the rows before it, as float32; what stands before the first token is of no token's document."""
    held[:HALO] = before[0, :, lanes].astype(jnp.float32)

    def strip(row: Any, _: None) -> None:
        held[pl.ds(HALO + row, STRIP)] = u[0, pl.ds(row, STRIP), lanes].astype(jnp.float32)

    tiles.strips(strip)


def _is_same(same: Any, row: Any, taps: int) -> list[jax.Array]:
    bits = same[0, pl.ds(row, STRIP)]
    return [(bits & (1 << s)) != 0 for s in range(taps)]


def _convolved(held: Any, kernel: Any, bias: Any, same: list[jax.Array], lanes: slice, row: Any) -> tuple[jax.Array, list]:
    """(a strip before its SiLU, the inputs of each shift)."""
    taps = len(same)
    shifted = [held[pl.ds(HALO + row - s, STRIP)] for s in range(taps)]
    z = bias[:, lanes]
    for s, own in enumerate(shifted):
        z = z + kernel[taps - 1 - s : taps - s, lanes] * (own if s == 0 else jnp.where(same[s], own, 0.0))
    return z, shifted


def _forward_kernel(tiles: _Tiles, u: Any, before: Any, kernel: Any, bias: Any, same: Any, y: Any, held: Any) -> None:
    for lanes in tiles.lanes():
        _load(tiles, u, before, lanes, held)

        def strip(row: Any, _: None, lanes: slice = lanes) -> None:
            z, _ = _convolved(held, kernel, bias, _is_same(same, row, tiles.taps), lanes, row)
            y[0, pl.ds(row, STRIP), lanes] = (z * sigmoid(z)).astype(y.dtype)

        tiles.strips(strip)


def _backward_kernel(users: int, tiles: _Tiles, u: Any, before: Any, kernel: Any, bias: Any, same: Any, *refs: Any) -> None:
    """`dz` [taps, rows, lanes]: what of a token's dz goes to the token s before; `after`: its first rows of the next tile."""
    dys, (du, sums, held, dz, after), taps, rows = refs[:users], refs[users:], tiles.taps, tiles.rows

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        after[...] = jnp.zeros_like(after)

    for n, lanes in enumerate(tiles.lanes()):
        _load(tiles, u, before, lanes, held)

        def strip(row: Any, total: Any, lanes: slice = lanes) -> Any:
            is_same = _is_same(same, row, taps)
            z, shifted = _convolved(held, kernel, bias, is_same, lanes, row)
            gate = sigmoid(z)
            dy = sum(ref[0, pl.ds(row, STRIP), lanes].astype(jnp.float32) for ref in dys)
            own = dy * gate * (1.0 + z * (1.0 - gate))
            parts = [own, *(jnp.where(is_same[s], own, 0.0) for s in range(1, taps))]
            for s, part in enumerate(parts):
                dz[s, pl.ds(row, STRIP)] = part
            products = [part * x for part, x in zip(parts, shifted, strict=True)] + [own]
            return tuple(sum_ + p.reshape(-1, SUBLANES, LANES).sum(axis=0) for sum_, p in zip(total, products, strict=True))

        total = tiles.strips(strip, tuple(jnp.zeros((SUBLANES, LANES), jnp.float32) for _ in range(taps + 1)))
        for s, own in enumerate(total):
            sums[s * SUBLANES : (s + 1) * SUBLANES, lanes] += own
        for s in range(1, taps):
            dz[s, rows:] = after[n, s]
            after[n, s] = dz[s, :SUBLANES]

        def inputs(row: Any, _: None, lanes: slice = lanes) -> None:
            parts = [dz[s, pl.ds(row + s, STRIP)] * kernel[taps - 1 - s : taps - s, lanes] for s in range(taps)]
            du[0, pl.ds(row, STRIP), lanes] = sum(parts[1:], parts[0]).astype(du.dtype)

        tiles.strips(inputs)
