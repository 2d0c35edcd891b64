"""Mamba-2's skip, gate and grouped norm on TPU: one kernel forward and one backward, every operand read once as it lies.

XLA would hold heads of 64 channels with the tokens along lanes, and copy everything to and from the kernels beside it. Of a
strip of tokens a column is 128 lanes; a group of the norm is some columns, or parts of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from elastic_jax.model.ssd_blocks import WIDEST, groups_in_lanes
from elastic_jax.model.tiles import LANES, SUBLANES, sigmoid

STRIP = 16  # the rows of a strip: a tile of bfloat16
ROWS, MOST = 256, 256 * 1024  # rows of a tile, and numbers of it that the chip has room for


def fits_gated_norm_kernel(shape_BxTxGxMxP: tuple[int, ...]) -> bool:
    """Whether the tokens of this shape are whole tiles, and so are some groups that find room on the chip."""
    _, length, groups, heads, channels = shape_BxTxGxMxP
    width = groups_in_lanes(groups, heads * channels)[0] * heads * channels
    return length % LANES == 0 and width % LANES == 0 and width <= WIDEST


@partial(jax.jit, static_argnames=('eps', 'interpret'))  # traced once for all layers of one shape
def gated_norm_by_kernel(
    y_BxTxGxMxP: jax.Array,
    x_BxTxGxMxP: jax.Array,
    z_BxTxGxMxP: jax.Array,
    d_GxM: jax.Array,
    scale_GxMxP: jax.Array,
    eps: float,
    interpret: bool = False,
) -> jax.Array:
    """scale · g / rms(g) over a group's channels, in x's type; g = (y + d · x) · silu(z)."""
    shape = x_BxTxGxMxP.shape
    groups, channels = shape[2], shape[-1]
    flat = lambda u: u.reshape(*shape[:2], -1)
    row = lambda u: u.astype(jnp.float32).reshape(1, -1)
    d_1xC = jnp.repeat(row(d_GxM), channels, axis=1)
    operands = flat(y_BxTxGxMxP).astype(jnp.float32), flat(x_BxTxGxMxP), flat(z_BxTxGxMxP), d_1xC, row(scale_GxMxP)
    return _gated_norm(groups, eps, interpret, *operands).reshape(shape)


class _Tiles:
    """The grid and its blocks: groups, then sequences, then tiles of tokens; and the columns of a group."""

    def __init__(self, shape: tuple[int, ...], groups: int, eps: float):
        batch, length, channels = shape
        self.group, self.eps = channels // groups, eps
        self.groups = groups_in_lanes(groups, self.group)[0]
        self.width = self.groups * self.group
        self.rows = ROWS if length % ROWS == 0 and ROWS * self.width <= MOST else LANES
        self.grid = (channels // self.width, batch, length // self.rows)
        self.own = pl.BlockSpec((1, self.rows, self.width), lambda c, b, t: (b, t, c))
        self.of_channel = lambda rows: pl.BlockSpec((rows, self.width), lambda c, b, t: (0, c))

    def columns(self) -> list[slice]:
        return [slice(start, start + LANES) for start in range(0, self.width, LANES)]

    def means(self, columns: list[jax.Array]) -> list[jax.Array]:
        """Of every group the mean over its channels, [STRIP, 1]."""
        found = []
        for group in range(self.groups):
            parts = [self._only(x, column, group) for column, x in zip(self.columns(), columns, strict=True)]
            found.append(jnp.sum(sum(part for part in parts if part is not None), axis=1, keepdims=True) / self.group)
        return found

    def spread(self, of_group: list[jax.Array]) -> list[jax.Array]:
        """A number of each group on all of its lanes, by column; whole columns stay [STRIP, 1]."""
        result = []
        for column in self.columns():
            within = range(column.start // self.group, (column.stop - 1) // self.group + 1)
            own = of_group[within[0]]
            for group in within[1:]:
                own = jnp.where(_lane() >= group * self.group - column.start, of_group[group], own)
            result.append(own)
        return result

    def _only(self, x: jax.Array, column: slice, group: int) -> jax.Array | None:
        first, last = group * self.group - column.start, (group + 1) * self.group - column.start
        if last <= 0 or first >= LANES:
            return None
        return x if first <= 0 and last >= LANES else jnp.where((_lane() >= first) & (_lane() < last), x, 0.0)

    def strips(self, body: Any) -> None:
        jax.lax.fori_loop(0, self.rows // STRIP, lambda i, _: body(pl.ds(i * STRIP, STRIP)), None, unroll=4)

    def call(self, body: Any, interpret: bool, inputs: list, in_specs: list, out_shape: list, out_specs: list) -> Any:
        order = ('parallel', 'arbitrary', 'arbitrary')
        return pl.pallas_call(
            partial(body, self), grid=self.grid, in_specs=in_specs, out_specs=out_specs, out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(dimension_semantics=order), interpret=interpret,
        )(*inputs)  # fmt: skip


def _lane() -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (STRIP, LANES), 1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gated_norm(groups: int, eps: float, interpret: bool, *operands: jax.Array) -> jax.Array:
    y, x, _, _, _ = operands
    tiles = _Tiles(y.shape, groups, eps)
    specs = [tiles.own] * 3 + [tiles.of_channel(1)] * 2
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    return tiles.call(_forward_kernel, interpret, list(operands), specs, out, [tiles.own])[0]


def _forward(groups: int, eps: float, interpret: bool, *operands: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _gated_norm(groups, eps, interpret, *operands), operands


def _backward(groups: int, eps: float, interpret: bool, operands: tuple[jax.Array, ...], out_grad: jax.Array) -> tuple:
    y, x, z, _, _ = operands
    tiles = _Tiles(y.shape, groups, eps)
    specs = [tiles.own] * 3 + [tiles.of_channel(1)] * 2 + [tiles.own]
    like = lambda u: jax.ShapeDtypeStruct(u.shape, u.dtype)
    sums = jax.ShapeDtypeStruct((SUBLANES, y.shape[-1]), jnp.float32)
    out, out_specs = [like(y), like(x), like(z), sums, sums], [tiles.own] * 3 + [tiles.of_channel(SUBLANES)] * 2
    inputs = [*operands, out_grad]
    *wide, d_sums, scale_sums = tiles.call(_backward_kernel, interpret, inputs, specs, out, out_specs)
    return *wide, d_sums.sum(axis=0, keepdims=True), scale_sums.sum(axis=0, keepdims=True)


_gated_norm.defvjp(_forward, _backward)


def _gated(y: Any, x: Any, z: Any, d: Any, rows: Any, columns: list[slice]) -> tuple[list, list, list]:
    """By column: x, y + d x, and z's sigmoid with z."""
    take = lambda ref: [ref[0, rows, column].astype(jnp.float32) for column in columns]
    xs, zs = take(x), take(z)
    skipped = [own + d[:, column] * x for own, x, column in zip(take(y), xs, columns, strict=True)]
    return xs, skipped, [(sigmoid(z), z) for z in zs]


def _forward_kernel(tiles: _Tiles, y: Any, x: Any, z: Any, d: Any, scale: Any, out: Any) -> None:
    columns = tiles.columns()

    def strip(rows: Any) -> None:
        _, skipped, gates = _gated(y, x, z, d, rows, columns)
        gated = [own * gate * z for own, (gate, z) in zip(skipped, gates, strict=True)]
        inverse = tiles.spread([jax.lax.rsqrt(mean + tiles.eps) for mean in tiles.means([g * g for g in gated])])
        for g, r, column in zip(gated, inverse, columns, strict=True):
            out[0, rows, column] = (g * r * scale[:, column]).astype(out.dtype)

    tiles.strips(strip)


def _backward_kernel(
    tiles: _Tiles, y: Any, x: Any, z: Any, d: Any, scale: Any, dout: Any, dy: Any, dx: Any, dz: Any, d_sums: Any, scale_sums: Any
) -> None:  # fmt: skip
    columns = tiles.columns()

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _() -> None:
        d_sums[...] = jnp.zeros_like(d_sums)
        scale_sums[...] = jnp.zeros_like(scale_sums)

    by_sublane = lambda u: u.reshape(-1, SUBLANES, LANES).sum(axis=0)

    def strip(rows: Any) -> None:
        xs, skipped, gates = _gated(y, x, z, d, rows, columns)
        gated = [own * gate * z for own, (gate, z) in zip(skipped, gates, strict=True)]
        inverse = tiles.spread([jax.lax.rsqrt(mean + tiles.eps) for mean in tiles.means([g * g for g in gated])])
        normed = [g * r for g, r in zip(gated, inverse, strict=True)]
        given = [dout[0, rows, column].astype(jnp.float32) for column in columns]
        normed_grads = [g * scale[:, column] for g, column in zip(given, columns, strict=True)]
        shared = tiles.spread(tiles.means([g * n for g, n in zip(normed_grads, normed, strict=True)]))
        for j, column in enumerate(columns):
            scale_sums[:, column] += by_sublane(given[j] * normed[j])
            gated_grad = inverse[j] * (normed_grads[j] - normed[j] * shared[j])
            gate, own = gates[j]
            skipped_grad = gated_grad * gate * own
            dy[0, rows, column] = skipped_grad
            dx[0, rows, column] = (skipped_grad * d[:, column]).astype(dx.dtype)
            dz[0, rows, column] = (gated_grad * skipped[j] * gate * (1.0 + own * (1.0 - gate))).astype(dz.dtype)
            d_sums[:, column] += by_sublane(skipped_grad * xs[j])

    tiles.strips(strip)
