"""A batch of rows being continued: chunked prefill, and decoding in pieces.

Few programs are compiled, and none for a request: chunks, batches and caches come in a handful of sizes, and all that a request
may choose is an array. A row that has ended, waits, or is padding stands still while others go on: rows do not depend on
each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.errors import WorkError, reason
from elastic_jax.infer.placed import everywhere, place_rows
from elastic_jax.infer.resident import Weights
from elastic_jax.infer.sampling import Knobs, Sampling, draw, entropy, knobs_of
from elastic_jax.model.cache import Cache, cached_hidden_states, init_cache, recurrent_blocks, rewind
from elastic_jax.model.decoder import unembed

CHUNKS = (256, 64, 16)
PIECE = 16
NO_TOKEN = -1


class Requests(NamedTuple):
    """What each row asked for.

    Attributes:
      seed_B: of what each row draws. stops_BxN: the tokens at which a row ends.
      entropy_B: in nats; a row waits before a token that is less certain (infinite: never).
    """

    knobs: Knobs
    seed_B: jax.Array
    stops_BxN: jax.Array
    entropy_B: jax.Array


class State(NamedTuple):
    """Rows between two tokens.

    Attributes:
      logits_BxV: of each row's next token, float32.
      seen_BxV: the tokens that a row holds, for the repetition penalty.
      drawn_B: how many tokens a row has drawn; the n-th is drawn with the n-th key of its seed, however it is batched.
      left_B: how many tokens a row may still gain; 0 when it has ended.
    """

    cache: Cache
    logits_BxV: jax.Array
    seen_BxV: jax.Array
    drawn_B: jax.Array
    left_B: jax.Array
    requests: Requests


def requests_of(
    samplings: Sequence[Sampling], seeds: Sequence[int], stop_ids: Sequence[int] = (), entropy_limit: float = float('inf')
) -> Requests:
    """The requests of rows as arrays; all rows end at the same tokens."""
    rows = len(samplings)
    return Requests(
        knobs_of(samplings),
        np.asarray([seed % 2**32 for seed in seeds], np.uint32),
        np.tile(np.asarray(stop_ids, np.int32), (rows, 1)),
        np.full(rows, entropy_limit, np.float32),
    )


def empty_state(weights: Weights, requests: Requests, slots: int, max_tokens: Sequence[int]) -> State:
    """Rows that hold nothing yet, each of which may gain `max_tokens`; made where the weights are.

    Raises: WorkError when there is no memory for that many slots.
    """
    try:
        return _empty_state(weights, requests, np.asarray(max_tokens, np.int32), slots)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise WorkError(
            f'the caches of {len(max_tokens)} rows of {slots} tokens do not fit in memory ({reason(error)}); ask for fewer '
            'tokens, or give a server fewer --slots or a smaller --context'
        ) from error


@partial(jax.jit, static_argnames='slots')
def _empty_state(weights: Weights, requests: Requests, left_B: jax.Array, slots: int) -> State:
    rows, vocab = left_B.shape[0], weights.arch.vocab
    state = State(
        init_cache(weights.arch, rows, slots, weights.dtype),
        jnp.zeros((rows, vocab), jnp.float32),
        jnp.zeros((rows, vocab), bool),
        jnp.zeros(rows, jnp.int32),
        left_B,
        requests,
    )
    return place_rows(state, weights)


def mark_seen(seen_BxV: jax.Array, tokens_BxT: jax.Array, valid_B: jax.Array) -> jax.Array:
    """`seen_BxV` with each row's first `valid_B` tokens."""
    rows_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[0])[:, None], tokens_BxT.shape)
    real_BxT = jnp.arange(tokens_BxT.shape[1])[None] < valid_B[:, None]
    return seen_BxV.at[rows_BxT, jnp.where(real_BxT, tokens_BxT, seen_BxV.shape[1])].set(True, mode='drop')


def ends(requests: Requests, tokens: jax.Array) -> jax.Array:
    """Which of the tokens [B, ...] end their row."""
    stops = requests.stops_BxN.reshape(tokens.shape[0], *(1,) * (tokens.ndim - 1), -1)
    return jnp.any(tokens[..., None] == stops, axis=-1)


def token_keys(requests: Requests, drawn_B: jax.Array) -> jax.Array:
    """The key of each row's next token."""
    return jax.vmap(lambda seed, drawn: jax.random.fold_in(jax.random.key(seed), drawn))(requests.seed_B, drawn_B)


def going(state: State) -> jax.Array:
    """Which rows draw a token now, [B]: those that have not ended and are certain enough."""
    limit_B = state.requests.entropy_B
    certain = lambda: entropy(state.logits_BxV) <= limit_B
    certain_B = jax.lax.cond(jnp.any(jnp.isfinite(limit_B)), certain, lambda: jnp.full(limit_B.shape, True))
    return (state.left_B > 0) & certain_B


def run_tokens(weights: Weights, params: Any, state: State, tokens_BxT: jax.Array, valid_B: jax.Array) -> State:
    """The state after each row's first `valid_B` tokens; a row with none keeps its logits."""
    hidden_BxTxD, cache = cached_hidden_states(params, tokens_BxT, weights.arch, state.cache, valid_B, weights.dtype)
    last_BxD = jnp.take_along_axis(hidden_BxTxD, jnp.maximum(valid_B - 1, 0)[:, None, None], axis=1)[:, 0]
    own_BxV = unembed(params, last_BxD, weights.dtype)
    logits_BxV = jnp.where(valid_B[:, None] > 0, own_BxV, state.logits_BxV)
    seen_BxV = mark_seen(state.seen_BxV, tokens_BxT, valid_B)
    return place_rows(state._replace(cache=cache, logits_BxV=logits_BxV, seen_BxV=seen_BxV), weights)


@partial(jax.jit, donate_argnames='state')
def feed_chunk(weights: Weights, state: State, tokens_BxT: jax.Array, valid_B: jax.Array) -> State:
    """One chunk of prompts."""
    return run_tokens(weights, weights.own(), state, tokens_BxT, valid_B)


@partial(jax.jit, donate_argnames='state')
def advance(weights: Weights, state: State, steps: jax.Array) -> tuple[State, jax.Array, jax.Array]:
    """At most `steps` ≤ PIECE decoding steps: (state, tokens [B, PIECE], whether each row goes on [B]).

    NO_TOKEN stands where a row had none.
    """
    params = weights.own()

    def more(carry: tuple[jax.Array, State, jax.Array, jax.Array]) -> jax.Array:
        step, _, active_B, _ = carry
        return (step < steps) & jnp.any(active_B)

    def body(carry: tuple[jax.Array, State, jax.Array, jax.Array]) -> tuple[jax.Array, State, jax.Array, jax.Array]:
        step, state, active_B, tokens_BxN = carry
        keys_B = token_keys(state.requests, state.drawn_B)
        token_B = jnp.where(active_B, draw(state.logits_BxV, state.seen_BxV, keys_B, state.requests.knobs), 0)
        tokens_BxN = tokens_BxN.at[:, step].set(jnp.where(active_B, token_B, NO_TOKEN))
        gained_B = active_B.astype(jnp.int32)
        state = run_tokens(weights, params, state, token_B[:, None], gained_B)
        ended_B = active_B & ends(state.requests, token_B)
        left_B = jnp.where(ended_B, 0, state.left_B - gained_B)
        state = state._replace(drawn_B=state.drawn_B + gained_B, left_B=left_B)
        return step + 1, state, active_B & going(state), tokens_BxN

    tokens_BxN = jnp.full((state.left_B.shape[0], PIECE), NO_TOKEN, jnp.int32)
    _, state, active_B, tokens_BxN = jax.lax.while_loop(more, body, (jnp.int32(0), state, going(state), tokens_BxN))
    return place_rows(state, weights), *everywhere((tokens_BxN, active_B), weights)


def chunk_sizes(length: int) -> list[int]:
    """Static chunk sizes that cover `length` tokens: the largest that is filled for three quarters, again and again."""
    sizes = []
    while length > 0:
        sizes.append(next((size for size in CHUNKS if length >= 0.75 * size), CHUNKS[-1]))
        length -= sizes[-1]
    return sizes


def bucket(least: int, smallest: int = 1) -> int:
    """The next power of two, or one and a half times one, from `smallest` up: few sizes, at most half of one wasted."""
    size = smallest
    while size < least:
        size = size * 3 // 2 if size & (size - 1) == 0 and size > 1 else (size // 3 * 4 if size > 1 else 2)
    return size


class Mark(NamedTuple):
    """Where rows were at some time, so that they can be taken back there: all that later tokens overwrite."""

    length_B: jax.Array
    recurrent: dict[str, Any]


def mark_of(cache: Cache) -> Mark:
    """Where all rows are now."""
    return Mark(cache.length_B, recurrent_blocks(cache))


@jax.jit
def move_mark(mark: Mark, cache: Cache, rows_B: jax.Array) -> Mark:
    """The mark with the chosen rows' present place."""
    choose = lambda old, new: jnp.where(rows_B.reshape(-1, *(1,) * (old.ndim - 1)), new, old)
    return jax.tree.map(choose, mark, mark_of(cache))


class Decoding:
    """Rows of a batch as their caller holds them; the batch is padded with rows that stand still.

    Args:
      capacity: how many tokens a row may come to hold, prompt, continuation and all.
      max_tokens: how many tokens each row may gain.
    Attributes:
      tokens: what each row holds. going: whether each row gains more, as of the last piece.
    """

    def __init__(self, weights: Weights, requests: Requests, capacity: int, max_tokens: Sequence[int]):
        self.weights, self.rows, self.capacity = weights, len(max_tokens), capacity
        # What is fed is padded to chunks, and padding must not reach past the last slot either.
        self.slots = bucket(capacity + CHUNKS[1], 64)
        self.tokens: list[list[int]] = [[] for _ in range(self.rows)]
        padding = _power_of_two(self.rows) - self.rows
        wide = jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[:1], padding, axis=0)]), requests)
        self.state = empty_state(weights, wide, self.slots, [*max_tokens, *[0] * padding])
        self.going, self.marked = [True] * self.rows, [0] * self.rows
        self._mark = jax.tree.map(jnp.copy, mark_of(self.state.cache))

    def feed(self, tokens: Sequence[Sequence[int]]) -> None:
        """Appends tokens to every row (none: an empty list)."""
        lengths, start = np.asarray([len(row) for row in tokens]), 0
        for size in chunk_sizes(int(lengths.max(initial=0))):
            longest = max(map(len, self.tokens))
            if longest + size > self.slots:
                raise ValueError(f'a chunk of {size} after {longest} tokens does not fit {self.slots} slots')
            chunk = np.zeros((self.state.left_B.shape[0], size), np.int32)
            valid = np.zeros(chunk.shape[0], np.int32)
            valid[: self.rows] = np.clip(lengths - start, 0, size)
            for row, ids in enumerate(tokens):
                chunk[row, : valid[row]] = ids[start : start + size]
                self.tokens[row].extend(chunk[row, : valid[row]].tolist())
            self.state = feed_chunk(self.weights, self.state, chunk, valid)
            start += size

    def piece(self, steps: int = PIECE) -> list[list[int]]:
        """The next tokens of every row, at most `steps`; fewer where a row has ended or waits."""
        self.state, tokens_BxN, going_B = advance(self.weights, self.state, np.int32(steps))
        self.going = np.asarray(going_B)[: self.rows].tolist()
        gained = [[token for token in row if token != NO_TOKEN] for row in np.asarray(tokens_BxN)[: self.rows].tolist()]
        for held, new in zip(self.tokens, gained, strict=True):
            held.extend(new)
        return gained

    def mark(self, rows: Sequence[int]) -> None:
        """Remembers where these rows are, for `back_to`."""
        chosen = np.isin(np.arange(self.state.left_B.shape[0]), rows)
        self._mark = move_mark(self._mark, self.state.cache, chosen)
        for row in rows:
            self.marked[row] = len(self.tokens[row])

    def back_to(self, lengths: Sequence[int]) -> None:
        """Takes every row back to its first so many tokens, not before its mark; those after the mark are run again."""
        kept = [tokens[:length] for tokens, length in zip(self.tokens, lengths, strict=True)]
        again = [tokens[mark:] for tokens, mark in zip(kept, self.marked, strict=True)]
        self.tokens = [tokens[:mark] for tokens, mark in zip(kept, self.marked, strict=True)]
        cache = rewind(self.state.cache, self._mark.length_B, jax.tree.map(jnp.copy, self._mark.recurrent))
        self.state = self.state._replace(cache=cache, seen_BxV=self._seen(kept))
        self.feed(again)

    def _seen(self, tokens: Sequence[Sequence[int]]) -> np.ndarray:
        seen = np.zeros(self.state.seen_BxV.shape, bool)
        for row, held in enumerate(tokens):
            seen[row, held] = True
        return seen

    @property
    def left(self) -> list[int]:
        """How many tokens each row may still gain."""
        return np.asarray(self.state.left_B)[: self.rows].tolist()

    def allow(self, max_tokens: Sequence[int], drawn: Sequence[int] | None = None) -> None:
        """Sets how many tokens each row may still gain, and how many it counts as drawn."""
        pad = lambda values: np.asarray([*values, *[0] * (self.state.left_B.shape[0] - self.rows)], np.int32)
        self.state = self.state._replace(left_B=pad(max_tokens), drawn_B=self.state.drawn_B if drawn is None else pad(drawn))


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()
