"""The slots of one size: rows that join and leave between decoding steps, in one state of fixed shape.

A row that joins is prefilled alone, chunk by chunk, and then written into its slot: others neither wait for a long prompt nor are
computed along with it. Five programs do it all, whatever is asked: three sizes of chunk, the joining, and the decoding piece. Two
more take a row out of its slot, to be handed to another size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.infer.decoding import (
    CHUNKS,
    NO_TOKEN,
    Mark,
    State,
    advance,
    bucket,
    chunk_sizes,
    empty_state,
    feed_chunk,
    mark_of,
    move_mark,
    requests_of,
)
from elastic_jax.infer.resident import Weights
from elastic_jax.infer.sampling import Sampling
from elastic_jax.model.cache import Cache, rewind


@dataclasses.dataclass(frozen=True)
class Given:
    """The cache of a row's first `count` tokens, from another size."""

    cache: Cache
    count: int


@dataclasses.dataclass
class Prefill:
    """A row on its way into a slot: its state, the tokens that it holds, and those that are still to be fed.

    `mark` is where it was before its last token, of a row that may be taken out again (`marks`).
    """

    state: State
    held: list[int]
    rest: list[int]
    marks: bool = False
    mark: Mark | None = None


class Lane:
    """Slots for one size.

    Args:
      context: how many tokens a row may come to hold.
    """

    def __init__(self, weights: Weights, slots: int, context: int, stop_ids: Sequence[int]):
        self.slots, self.stop_ids = slots, tuple(stop_ids)
        # What is fed is padded to chunks, and padding must not reach past the last place either.
        self.places = bucket(context + CHUNKS[0], 64)
        nobody = requests_of([Sampling()] * slots, [0] * slots, stop_ids)
        self.state = empty_state(weights, nobody, self.places, [0] * slots)
        self.left = [0] * slots
        self.lengths = [0] * slots
        # Rows that may be taken out: how many tokens each held at its mark, and the marks of all.
        self.marked: dict[int, int] = {}
        self._mark: Mark | None = None
        self._drawing: set[int] = set()  # rows that are sure to draw in the next piece

    @property
    def bytes(self) -> int:
        """What the caches and logits of all slots take."""
        plain = jax.tree.leaves((self.state.cache, self.state.logits_BxV, self.state.seen_BxV, self._mark))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in plain)

    @property
    def active(self) -> bool:
        return any(self.left)

    def begin(
        self,
        weights: Weights,
        tokens: list[int],
        sampling: Sampling,
        seed: int,
        drawn: int = 0,
        entropy: float | None = None,
        marks: bool = False,
        given: Given | None = None,
    ) -> Prefill:
        """A row that is to hold these tokens, and has drawn so many before (in another lane).

        Args:
          entropy: the row waits before a token less certain than this, in nats. marks: whether it may be taken out.
          given: the cache of its first tokens; without one all are fed.
        """
        limit = float('inf') if entropy is None else entropy
        state = empty_state(weights, requests_of([sampling], [seed], self.stop_ids, limit), self.places, [0])
        state = state._replace(drawn_B=np.asarray([drawn], np.int32))
        count = 0
        if given is not None:
            seen, count = np.zeros(state.seen_BxV.shape, bool), given.count
            seen[0, tokens[:count]] = True
            state = state._replace(cache=given.cache, seen_BxV=seen)
        return Prefill(state, tokens[:count], tokens[count:], marks)

    def feed(self, weights: Weights, prefill: Prefill) -> int:
        """Feeds the next chunk of a row; returns its size."""
        count = len(prefill.rest)
        if prefill.marks and count > 1:
            count -= 1  # the last token has a chunk of its own
        elif prefill.marks:
            prefill.mark = jax.tree.map(jnp.copy, mark_of(prefill.state.cache))
        size = chunk_sizes(count)[0]
        now, prefill.rest = prefill.rest[: min(size, count)], prefill.rest[min(size, count) :]
        chunk = np.zeros((1, size), np.int32)
        chunk[0, : len(now)] = now
        prefill.state = feed_chunk(weights, prefill.state, chunk, np.asarray([len(now)], np.int32))
        prefill.held = [*prefill.held, *now]
        return size

    def join(self, slot: int, prefill: Prefill, left: int) -> None:
        """Puts a row that is wholly fed into a slot, where it may draw `left` tokens."""
        self.state = _join(self.state, prefill.state, np.int32(slot))
        self.left[slot], self.lengths[slot] = left, len(prefill.held)
        if prefill.mark is not None:
            if self._mark is None:
                # As a move of all, which compiles the program that later moves need.
                self._mark = move_mark(mark_of(self.state.cache), self.state.cache, np.ones(self.slots, bool))
            self._mark, self.marked[slot] = _join_mark(self._mark, prefill.mark, np.int32(slot)), len(prefill.held) - 1

    def leave(self, slot: int) -> None:
        """Frees a slot: its row stands still until another joins."""
        self.left[slot] = 0
        self.marked.pop(slot, None)
        self._drawing.discard(slot)

    def take(self, weights: Weights, slot: int, tokens: list[int]) -> Cache:
        """The cache of a row, were it to hold just these tokens: no fewer than at its mark, and the same up to there."""
        cache = _row(self.state.cache, self._mark, np.int32(slot))
        nobody = requests_of([Sampling()], [0], self.stop_ids)
        state = empty_state(weights, nobody, self.places, [0])._replace(cache=cache)
        prefill = Prefill(state, [], tokens[self.marked[slot] :])
        while prefill.rest:
            self.feed(weights, prefill)
        return prefill.state.cache

    def piece(self, weights: Weights, steps: int) -> tuple[list[list[int]], list[bool]]:
        """(the next tokens of every slot, at most `steps`, and none of a free one; whether its row waits, unsure)."""
        # Before the piece, not after it: what it draws may be more than the row is to keep, and the mark must not be past that.
        if moved := self._drawing & self.marked.keys():
            chosen = np.isin(np.arange(self.slots), list(moved))
            self._mark = move_mark(self._mark, self.state.cache, chosen)
            self.marked |= {slot: self.lengths[slot] for slot in moved}
        state = self.state._replace(left_B=np.asarray(self.left, np.int32))
        self.state, tokens_BxN, going_B = advance(weights, state, np.int32(steps))
        gained = [[token for token in row if token != NO_TOKEN] for row in np.asarray(tokens_BxN).tolist()]
        for slot, new in enumerate(gained):
            self.lengths[slot] += len(new)
            self.left[slot] = 0 if new and new[-1] in self.stop_ids else self.left[slot] - len(new)
        going = np.asarray(going_B).tolist()
        self._drawing = {slot for slot, on in enumerate(going) if on}
        return gained, [left > 0 and not on for left, on in zip(self.left, going, strict=True)]


@partial(jax.jit, donate_argnames='slots')
def _join(slots: State, row: State, at: jax.Array) -> State:
    put: Any = lambda all_rows, own: all_rows.at[at].set(own[0])
    return jax.tree.map(put, slots, row._replace(left_B=jnp.zeros(1, jnp.int32)))


@partial(jax.jit, donate_argnames='marks')
def _join_mark(marks: Mark, own: Mark, at: jax.Array) -> Mark:
    return jax.tree.map(lambda all_rows, row: all_rows.at[at].set(row[0]), marks, own)


@jax.jit
def _row(cache: Cache, marks: Mark, at: jax.Array) -> Cache:
    """One row's cache as it was at its mark."""
    return jax.tree.map(lambda leaf: leaf[at][None], rewind(cache, marks.length_B, marks.recurrent))
