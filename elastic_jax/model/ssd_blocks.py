"""How the state-space kernels cut their operands: what a step of the grid computes, and what its matmuls take at once.

A unit is what the matmuls take at once: as many heads as fill 128 lanes, or one head where it is wider.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from elastic_jax.model.tiles import LANES, SUBLANES

CHUNK = 128
WIDEST = 2048  # channels of a step of the grid that on-chip memory holds


def fits_ssd_kernel(shape_BxTxGxMxP: tuple[int, ...], state: int) -> bool:
    """Whether tiles hold x of this shape: whole chunks, states of whole lanes, heads that fill lanes or are filled by them, and
    groups of which some are whole lanes and find room on the chip.
    """
    batch, length, groups, heads, channels = shape_BxTxGxMxP
    width = groups_of_a_block(batch, groups, heads * channels) * heads * channels
    whole = LANES % channels == 0 or channels % LANES == 0
    return length >= CHUNK and state % LANES == 0 and whole and width <= WIDEST


def groups_of_a_block(batch: int, groups: int, width: int) -> int:
    """As many groups of `width` channels as a step of the grid has room for: a step costs something of its own. Of one sequence
    at most half of them, as two cores may share the groups.
    """
    whole = groups_in_lanes(groups, width)
    fits = [n for n in whole if n * width <= WIDEST and (batch > 1 or n < groups)]
    return max(fits, default=whole[0])


def groups_in_lanes(groups: int, width: int) -> list[int]:
    """How many groups of `width` channels may go together: equal parts whose channels are whole lanes, and all."""
    return [*(n for n in range(1, groups) if groups % n == 0 and n * width % LANES == 0), groups]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one step of the grid computes: a chunk of `groups` groups of `per_group` heads."""

    groups: int
    per_group: int
    channels: int
    state: int
    interpret: bool

    @property
    def heads(self) -> int:
        return self.groups * self.per_group

    @property
    def rows(self) -> int:
        """Of what has a row for each head: whole tiles."""
        return self.heads + -self.heads % SUBLANES

    @property
    def width(self) -> int:
        """Lanes of x."""
        return self.heads * self.channels

    def lanes_of(self, group: int) -> slice:
        per_group = self.per_group * self.channels
        return slice(group * per_group, (group + 1) * per_group)

    def units(self) -> list[Unit]:
        size = max(1, LANES // self.channels)
        return [Unit(self, tuple(range(h, min(h + size, self.heads)))) for h in range(0, self.heads, size)]


@dataclasses.dataclass(frozen=True)
class Unit:
    blocks: Blocks
    heads: tuple[int, ...]

    @property
    def lanes(self) -> slice:
        return slice(self.heads[0] * self.blocks.channels, (self.heads[-1] + 1) * self.blocks.channels)

    @property
    def groups(self) -> list[int]:
        return sorted({self.group(h) for h in self.heads})

    def group(self, head: int) -> int:
        return head // self.blocks.per_group

    def pick(self, parts: Sequence[jax.Array]) -> jax.Array:
        """Of every head's part [R, lanes] its own lanes."""
        result = parts[0]
        for n, part in enumerate(parts[1:], 1):
            if part is not parts[n - 1]:
                result = jnp.where(self._lane(part) >= n * self.blocks.channels, part, result)
        return result

    def by_group(self, part: dict[int, jax.Array]) -> jax.Array:
        return self.pick([part[self.group(h)] for h in self.heads])

    def spread(self, columns: jax.Array) -> jax.Array:
        """[R, rows of the block] -> [R, lanes]: each head's column on all of its lanes."""
        width = self.lanes.stop - self.lanes.start
        return self.pick([jnp.broadcast_to(columns[:, h : h + 1], (columns.shape[0], width)) for h in self.heads])

    def fill(self, x: jax.Array) -> jax.Array:
        """[R, 128] of equal columns -> [R, lanes]."""
        width = self.lanes.stop - self.lanes.start
        return x if width == x.shape[1] else jnp.broadcast_to(x[:, :1], (x.shape[0], width))

    def only(self, x: jax.Array, head: int) -> jax.Array:
        """x [R, lanes] with zeros on the lanes of other heads."""
        if len(self.heads) == 1:
            return x
        lane, first = self._lane(x), (head - self.heads[0]) * self.blocks.channels
        return jnp.where((lane >= first) & (lane < first + self.blocks.channels), x, jnp.zeros_like(x))

    def _lane(self, x: jax.Array) -> jax.Array:
        return jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
