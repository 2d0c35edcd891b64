"""What kernels share: the sizes of a TPU's registers and memory, a matmul, a mask's number and a sigmoid."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LANES, SUBLANES = 128, 8  # of a register of 32-bit numbers
ROW_TILE = 16  # rows of a tile of bfloat16
MEMORY = 48 * 2**20  # bytes on the chip that a large kernel may take
BELOW = -1e30  # its exponential is 0


class Chip(NamedTuple):
    """What runs a kernel.

    Attributes:
      memory: bytes that it may take of a core's vector memory.
      interpret: whether it is JAX's interpreter.
    """

    memory: int = MEMORY
    interpret: bool = False


def dot(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Sum over dimension over[0] of x and over[1] of y, in float32; of float32 as exact as JAX's `default_matmul_precision`."""
    return jax.lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def sigmoid(z: jax.Array) -> jax.Array:
    """By tanh, one operation of the chip where 1 / (1 + exp(-z)) is a dozen."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)


def whole(size: int, stored: int, tile: int) -> int:
    """`size` in whole tiles, or all that is stored."""
    return min(stored, -(-size // tile) * tile)


def tile_of(size: int, stored: int, bytes_of_one: int, most: int, times: int = 1) -> int:
    """Columns at a time: of `size`, in whole lanes, in a multiple of `times` parts: 2 where two cores share them."""
    parts = times
    while (tile := -(-size // (parts * LANES)) * LANES) * bytes_of_one > most and tile > LANES:
        parts += times
    return whole(size, stored, LANES) if parts == 1 or size <= LANES else tile
