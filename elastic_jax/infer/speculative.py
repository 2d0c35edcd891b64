"""Self-speculative decoding: a small size drafts, a larger one verifies all drafts in one pass.

What comes out is distributed exactly as the larger size's own text (Leviathan et al., arXiv 2211.17192): a draft d is kept with
probability min(1, p(d) / q(d)); in place of the first that is not, a token is drawn from max(p - q, 0); after k kept drafts one
more is drawn from p. A greedy row's distributions are one-hot, so its tokens are the larger size's own.

Taking back: attention caches are shortened. The larger size's Mamba states are computed from what it verified, once it is known
how many tokens stay (`MambaTrial`), which reads no weights; the drafting size, which runs token by token, keeps the states of
all its steps, as it computes each anyhow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.infer.decoding import Decoding, Requests, ends, mark_seen, requests_of, token_keys
from elastic_jax.infer.generate import GREEDY, check_count, encode_prompts, per_prompt, seeds_of
from elastic_jax.infer.resident import Weights
from elastic_jax.infer.sampling import Knobs, Sampling, draw, token_probabilities
from elastic_jax.infer.text import Completion, Reader, check_stop
from elastic_jax.model.cache import Cache, cached_hidden_states, recurrent_blocks, rewind, settle_cache
from elastic_jax.model.decoder import unembed

ROUNDS = 4
MOST_DRAFTS = 64  # each is a pass of its own in the program of a round


class Speculation(NamedTuple):
    """Rows between two rounds.

    Attributes:
      large, small: the caches. The last token drawn is in neither; after a round whose drafts were all kept, the small one
        lacks the token before it too.
      pending_Bx2, pending_B: the tokens that the small cache lacks, and how many of the two they are.
    """

    large: Cache
    small: Cache
    pending_Bx2: jax.Array
    pending_B: jax.Array
    seen_BxV: jax.Array
    drawn_B: jax.Array
    left_B: jax.Array
    requests: Requests


class Round(NamedTuple):
    """What a round gave: tokens [B, k+1], how many of them count [B], how many drafts were kept [B]."""

    tokens_BxK: jax.Array
    count_B: jax.Array
    kept_B: jax.Array


@dataclasses.dataclass
class Tally:
    """What speculation did: rounds in which a row took part, tokens drafted and kept, tokens that came out."""

    rounds: int = 0
    drafted: int = 0
    kept: int = 0
    tokens: int = 0

    @property
    def acceptance(self) -> float:
        """The share of drafts that were kept."""
        return self.kept / self.drafted if self.drafted else 0.0

    def to_json(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), 'acceptance': self.acceptance}


def _sub_keys(requests: Requests, drawn_B: jax.Array, purpose: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(token_keys(requests, drawn_B), purpose)


def _pick(keys_B: jax.Array, probability_BxV: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.categorical)(keys_B, jnp.log(probability_BxV)).astype(jnp.int32)


DRAFT, KEEP, REPLACE = 1, 2, 3


def _draft(
    small: Weights, params: Any, state: Speculation, active_B: jax.Array, k: int
) -> tuple[jax.Array, jax.Array, list[Cache]]:
    """(drafts [B, k], their distributions [B, k, V], the cache before each draft was run)."""
    requests, seen_BxV, run = state.requests, state.seen_BxV, active_B.astype(jnp.int32)
    hidden_BxTxD, cache = cached_hidden_states(
        params, state.pending_Bx2, small.arch, state.small, state.pending_B * run, small.dtype
    )
    last_B = jnp.maximum(state.pending_B - 1, 0)
    hidden_BxD = jnp.take_along_axis(hidden_BxTxD, last_B[:, None, None], axis=1)[:, 0]
    tokens, probabilities, caches = [], [], [cache]
    for i in range(k):
        q_BxV = token_probabilities(unembed(params, hidden_BxD, small.dtype), seen_BxV, requests.knobs)
        token_B = _pick(_sub_keys(requests, state.drawn_B + i, DRAFT), q_BxV)
        tokens.append(token_B)
        probabilities.append(q_BxV)
        if i < k - 1:
            seen_BxV = mark_seen(seen_BxV, token_B[:, None], run)
            hidden_BxTxD, cache = cached_hidden_states(params, token_B[:, None], small.arch, cache, run, small.dtype)
            hidden_BxD = hidden_BxTxD[:, 0]
            caches.append(cache)
    return jnp.stack(tokens, axis=1), jnp.stack(probabilities, axis=1), caches


def _verify(
    large: Weights, params: Any, state: Speculation, drafts_BxK: jax.Array, active_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """(the larger size's distributions at every draft and after the last [B, k+1, V], its cache as a trial)."""
    last_B = jnp.take_along_axis(state.pending_Bx2, state.pending_B[:, None] - 1, axis=1)
    tokens_BxT = jnp.concatenate([last_B, drafts_BxK], axis=1)
    valid_B = tokens_BxT.shape[1] * active_B.astype(jnp.int32)
    hidden_BxTxD, trial = cached_hidden_states(params, tokens_BxT, large.arch, state.large, valid_B, large.dtype, trial=True)
    rows, length = tokens_BxT.shape
    seen = [mark_seen(state.seen_BxV, drafts_BxK, jnp.full(rows, count)) for count in range(length)]
    flat_knobs = Knobs(*(jnp.repeat(knob, length) for knob in state.requests.knobs))
    logits = unembed(params, hidden_BxTxD, large.dtype).reshape(rows * length, -1)
    p = token_probabilities(logits, jnp.stack(seen, axis=1).reshape(logits.shape), flat_knobs)
    return p.reshape(rows, length, -1), trial


def _round(large: Weights, small: Weights, own: tuple[Any, Any], state: Speculation, k: int) -> tuple[Speculation, Round]:
    active_B, requests = state.left_B > 0, state.requests
    drafts_BxK, q_BxKxV, caches = _draft(small, own[1], state, active_B, k)
    p_BxTxV, trial = _verify(large, own[0], state, drafts_BxK, active_B)

    at_draft = lambda probability: jnp.take_along_axis(probability, drafts_BxK[..., None], axis=2)[..., 0]
    uniform = lambda i: jax.vmap(jax.random.uniform)(_sub_keys(requests, state.drawn_B + i, KEEP))
    uniform_BxK = jnp.stack([uniform(i) for i in range(k)], axis=1)
    kept_BxK = uniform_BxK * at_draft(q_BxKxV) < at_draft(p_BxTxV[:, :k])
    kept_B = jnp.sum(jnp.cumprod(kept_BxK.astype(jnp.int32), axis=1), axis=1)

    # After all k drafts there is nothing to subtract.
    q_BxTxV = jnp.pad(q_BxKxV, ((0, 0), (0, 1), (0, 0)))
    here = lambda probability: jnp.take_along_axis(probability, kept_B[:, None, None], axis=1)[:, 0]
    p_BxV = here(p_BxTxV)
    rest_BxV = jnp.maximum(p_BxV - here(q_BxTxV), 0)
    rest_BxV = jnp.where(rest_BxV.sum(axis=1, keepdims=True) > 0, rest_BxV, p_BxV)
    new_B = _pick(_sub_keys(requests, state.drawn_B + kept_B, REPLACE), rest_BxV)

    places = jnp.arange(k + 1)[None]
    tokens_BxT = jnp.where(places == kept_B[:, None], new_B[:, None], jnp.pad(drafts_BxK, ((0, 0), (0, 1))))
    count_B = jnp.minimum(kept_B + 1, state.left_B)
    ends_BxT = ends(requests, tokens_BxT) & (places < count_B[:, None])
    ended_B = jnp.any(ends_BxT, axis=1)
    count_B = jnp.where(ended_B, jnp.argmax(ends_BxT, axis=1) + 1, count_B) * active_B
    gained_B = (kept_B + 1) * active_B

    # The small cache has run all drafts but the last; so when all are kept, the last is pending with the new token.
    all_kept_B = kept_B == k
    last_draft_B = drafts_BxK[:, -1]
    pending_Bx2 = jnp.stack([jnp.where(all_kept_B, last_draft_B, new_B), new_B], axis=1)
    pending_B = jnp.where(all_kept_B, 2, 1)
    step_B = jnp.minimum(kept_B, k - 1)
    choose = lambda *steps: jnp.take_along_axis(jnp.stack(steps), step_B.reshape(1, -1, *(1,) * (steps[0].ndim - 1)), axis=0)[0]
    recurrent = jax.tree.map(choose, *(recurrent_blocks(cache) for cache in caches))
    length_B = choose(*(cache.length_B for cache in caches))
    state = state._replace(
        large=settle_cache(large.arch, trial, gained_B),
        small=rewind(caches[-1], length_B, recurrent),
        pending_Bx2=jnp.where(active_B[:, None], pending_Bx2, state.pending_Bx2),
        pending_B=jnp.where(active_B, pending_B, state.pending_B),
        seen_BxV=mark_seen(state.seen_BxV, tokens_BxT, gained_B),
        drawn_B=state.drawn_B + count_B,
        left_B=jnp.where(ended_B & active_B, 0, state.left_B - count_B),
    )
    return state, Round(tokens_BxT, count_B, kept_B * active_B)


@partial(jax.jit, static_argnames='k', donate_argnames='state')
def speculate(large: Weights, small: Weights, state: Speculation, k: int) -> tuple[Speculation, Round]:
    """At most ROUNDS rounds of k drafts: (new state, what each round gave, [ROUNDS, B, ...]; nothing once all rows ended)."""
    own = large.own(), small.own()
    rows = state.left_B.shape[0]
    zeros = jnp.zeros((ROUNDS, rows), jnp.int32)

    def body(carry: tuple[jax.Array, Speculation, Round]) -> tuple[jax.Array, Speculation, Round]:
        i, state, rounds = carry
        state, new = _round(large, small, own, state, k)
        return i + 1, state, jax.tree.map(lambda all_rounds, one: all_rounds.at[i].set(one), rounds, new)

    more = lambda carry: (carry[0] < ROUNDS) & jnp.any(carry[1].left_B > 0)
    begun = (jnp.int32(0), state, Round(jnp.zeros((ROUNDS, rows, k + 1), jnp.int32), zeros, zeros))
    _, state, rounds = jax.lax.while_loop(more, body, begun)
    return state, rounds


@jax.jit
def begin(large: Any, small: Cache) -> tuple[Speculation, jax.Array]:
    """(the state after both prefilled, the first token of each row), which the larger size draws alone."""
    keys_B = token_keys(large.requests, large.drawn_B)
    active_B = (large.left_B > 0).astype(jnp.int32)
    token_B = draw(large.logits_BxV, large.seen_BxV, keys_B, large.requests.knobs)
    left_B = jnp.where(ends(large.requests, token_B), 0, large.left_B - active_B)
    state = Speculation(
        large.cache,
        small,
        jnp.stack([token_B, token_B], axis=1),
        jnp.ones_like(token_B),
        mark_seen(large.seen_BxV, token_B[:, None], active_B),
        large.drawn_B + active_B,
        left_B,
        large.requests,
    )
    return state, token_B


def stream_speculative(
    large: Weights,
    small: Weights,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    drafts: int = 4,
    max_tokens: int = 128,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop: Sequence[str] = (),
    seeds: Sequence[int] | int = 0,
) -> Iterator[tuple[list[Completion], Tally]]:
    """(completions as they grow, what speculation did so far); the last is final.

    Args:
      drafts: how many tokens the small size drafts in a round; the others as of `generate.stream`.
    """
    encoded, stop = encode_prompts(tokenizer, prompts), check_stop(stop)
    check_count('max_tokens', max_tokens)
    check_count('drafts', drafts, MOST_DRAFTS)
    requests = requests_of(per_prompt(sampling, prompts), seeds_of(seeds, prompts), tokenizer.stop_ids)
    capacity, limits = max(map(len, encoded)) + max_tokens + drafts + 1, [max_tokens] * len(prompts)
    pair = [Decoding(weights, requests, capacity, limits) for weights in (large, small)]
    for decoding in pair:
        decoding.feed([row.tolist() for row in encoded])
    state, first_B = begin(pair[0].state, pair[1].state.cache)
    readers = [Reader(tokenizer, stop, max_tokens, row) for row in encoded]
    gained, tally = [[token] for token in np.asarray(first_B)[: len(prompts)].tolist()], Tally(tokens=len(prompts))
    drawn = [1] * len(prompts)
    while True:
        completions = [reader.read(new) for reader, new in zip(readers, gained, strict=True)]
        yield completions, tally
        if all(completion.finish for completion in completions):
            return
        left = [0 if done.finish else max_tokens - count for done, count in zip(completions, drawn, strict=True)]
        padding = [0] * (state.left_B.shape[0] - len(prompts))
        state, rounds = speculate(large, small, state._replace(left_B=jnp.asarray(left + padding, jnp.int32)), drafts)
        tokens_RxBxK, count_RxB, kept_RxB = (np.asarray(each)[:, : len(prompts)] for each in rounds)
        counted = np.arange(tokens_RxBxK.shape[2]) < count_RxB[..., None]
        gained = [tokens_RxBxK[:, row][counted[:, row]].tolist() for row in range(len(prompts))]
        drawn = [count + len(new) for count, new in zip(drawn, gained, strict=True)]
        taken = int((count_RxB > 0).sum())
        tally = Tally(
            tally.rounds + taken,
            tally.drafted + taken * drafts,
            tally.kept + int(kept_RxB.sum()),
            tally.tokens + int(count_RxB.sum()),
        )


def generate_speculative(
    large: Weights, small: Weights, tokenizer: Tokenizer, prompts: Sequence[str], **options: Any
) -> tuple[list[Completion], Tally]:
    """The finished completions and what speculation did; arguments as of `stream_speculative`."""
    result: Any = None
    for result in stream_speculative(large, small, tokenizer, prompts, **options):  # noqa: B007
        pass
    return result
