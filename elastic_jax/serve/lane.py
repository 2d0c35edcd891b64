"""The slots of one size: rows that join and leave between decoding steps, in one state of fixed shape.

A row that joins is prefilled alone, chunk by chunk, and then written into its slot: others neither wait for a long prompt nor are
computed along with it. Five programs do it all, whatever is asked: three sizes of chunk, the joining, and the decoding piece.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.infer.decoding import (
    CHUNKS,
    NO_TOKEN,
    Requests,
    State,
    advance,
    bucket,
    chunk_sizes,
    empty_state,
    feed_chunk,
    requests_of,
)
from elastic_jax.infer.resident import Weights
from elastic_jax.infer.sampling import Sampling


@dataclasses.dataclass
class Prefill:
    """A row on its way into a slot: its state, and the tokens that are still to be fed."""

    state: State
    rest: list[int]


class Lane:
    """Slots for one size.

    Args:
      context: how many tokens a row may come to hold.
    """

    def __init__(self, weights: Weights, slots: int, context: int, eos_id: int):
        self.slots, self.eos_id = slots, eos_id
        # What is fed is padded to chunks, and padding must not reach past the last place either.
        self.places = bucket(context + CHUNKS[0], 64)
        nobody = requests_of([Sampling()] * slots, [0] * slots, eos_id)
        self.state = _empty(weights, nobody, self.places, slots)
        self.left = [0] * slots

    @property
    def bytes(self) -> int:
        """What the caches and logits of all slots take."""
        plain = jax.tree.leaves((self.state.cache, self.state.logits_BxV, self.state.seen_BxV))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in plain)

    @property
    def active(self) -> bool:
        return any(self.left)

    def begin(self, weights: Weights, tokens: list[int], sampling: Sampling, seed: int, drawn: int = 0) -> Prefill:
        """A row that is to hold these tokens, and has drawn so many before (in another lane)."""
        state = _empty(weights, requests_of([sampling], [seed], self.eos_id), self.places, 1)
        return Prefill(state._replace(drawn_B=np.asarray([drawn], np.int32)), tokens)

    def feed(self, weights: Weights, prefill: Prefill) -> int:
        """Feeds the next chunk of a row; returns its size."""
        size = chunk_sizes(len(prefill.rest))[0]
        now, prefill.rest = prefill.rest[:size], prefill.rest[size:]
        chunk = np.zeros((1, size), np.int32)
        chunk[0, : len(now)] = now
        prefill.state = feed_chunk(weights, prefill.state, chunk, np.asarray([len(now)], np.int32))
        return size

    def join(self, slot: int, prefill: Prefill, left: int) -> None:
        """Puts a row that is wholly fed into a slot, where it may draw `left` tokens."""
        self.state = _join(self.state, prefill.state, np.int32(slot))
        self.left[slot] = left

    def leave(self, slot: int) -> None:
        """Frees a slot: its row stands still until another joins."""
        self.left[slot] = 0

    def piece(self, weights: Weights, steps: int) -> list[list[int]]:
        """The next tokens of every slot, at most `steps`; none of a free one."""
        state = self.state._replace(left_B=np.asarray(self.left, np.int32))
        self.state, tokens_BxN, _ = advance(weights, state, np.int32(steps))
        gained = [[token for token in row if token != NO_TOKEN] for row in np.asarray(tokens_BxN).tolist()]
        for slot, new in enumerate(gained):
            self.left[slot] = 0 if self.eos_id in new else self.left[slot] - len(new)
        return gained


@partial(jax.jit, static_argnames=('places', 'rows'))
def _empty(weights: Weights, requests: Requests, places: int, rows: int) -> State:
    return empty_state(weights, requests, places, [0] * rows)


@partial(jax.jit, donate_argnames='slots')
def _join(slots: State, row: State, at: jax.Array) -> State:
    put: Any = lambda all_rows, own: all_rows.at[at].set(own[0])
    return jax.tree.map(put, slots, row._replace(left_B=jnp.zeros(1, jnp.int32)))
