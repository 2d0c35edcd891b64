"""Text from one model: chunked prefill, then decoding in pieces, so that text can be streamed and stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.arch import Arch
from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.errors import UserError
from elastic_jax.infer.sampling import Sampling, draw
from elastic_jax.model.cache import Cache, cached_hidden_states, init_cache
from elastic_jax.model.decoder import unembedding

PREFILL_CHUNK = 256
PIECE = 16
GREEDY = Sampling()


@dataclasses.dataclass
class Completion:
    """One prompt's continuation. `finish` is 'stop' (end of text or a stop string) or 'length'."""

    text: str
    tokens: list[int]
    finish: str


class Decoding:
    """A batch of prompts being continued by one model; every `piece()` decodes up to PIECE tokens of each row.

    Args:
      prompts: token ids of each row; at least one each.
      max_tokens: how many tokens a row may gain; fixes the cache's size.
      seeds: one per row.
    """

    def __init__(
        self,
        params: Any,
        arch: Arch,
        prompts: Sequence[np.ndarray],
        max_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        dtype: Any = jnp.float32,
    ):
        self.params, self.arch, self.sampling, self.dtype = params, arch, sampling, jnp.dtype(dtype)
        lengths = np.asarray([len(prompt) for prompt in prompts])
        chunks = -(-int(lengths.max()) // PREFILL_CHUNK)
        chunk = int(lengths.max()) if chunks == 1 else PREFILL_CHUNK
        # Rounded up, so that few shapes are compiled.
        chunk = -(-chunk // 16) * 16
        slots = -(-(chunks * chunk + max_tokens + PIECE) // 64) * 64
        cache = init_cache(arch, len(prompts), slots, self.dtype)
        seen = np.zeros((len(prompts), arch.vocab), bool)
        logits = jnp.zeros((len(prompts), arch.vocab), jnp.float32)
        for start in range(0, chunks * chunk, chunk):
            tokens = np.zeros((len(prompts), chunk), np.int32)
            valid = np.clip(lengths - start, 0, chunk)
            for row, prompt in enumerate(prompts):
                tokens[row, : valid[row]] = prompt[start : start + chunk]
                seen[row, prompt] = True
            logits, cache = prefill(params, tokens, cache, valid.astype(np.int32), logits, arch, self.dtype)
        self.logits, self.cache, self.seen = logits, cache, jnp.asarray(seen)
        self.keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))

    def piece(self) -> np.ndarray:
        """The next PIECE tokens of every row, [B, PIECE]."""
        carry = (self.logits, self.cache, self.seen, self.keys)
        carry, tokens_BxN = decode_piece(self.params, carry, self.arch, self.sampling, self.dtype)
        self.logits, self.cache, self.seen, self.keys = carry
        return np.asarray(tokens_BxN)


@partial(jax.jit, static_argnames=('arch', 'dtype'), donate_argnames=('cache',))
def prefill(
    params: Any, tokens_BxT: jax.Array, cache: Cache, valid_B: jax.Array, logits_BxV: jax.Array, arch: Arch, dtype: Any
) -> tuple[jax.Array, Cache]:
    """(logits after each row's last real token so far [B, V], cache); a row with none in this chunk keeps its logits."""
    hidden_BxTxD, cache = cached_hidden_states(params, tokens_BxT, arch, cache, valid_B, dtype)
    last_BxD = jnp.take_along_axis(hidden_BxTxD, jnp.maximum(valid_B - 1, 0)[:, None, None], axis=1)[:, 0]
    own_BxV = jnp.matmul(last_BxD, unembedding(params).astype(dtype), preferred_element_type=jnp.float32)
    return jnp.where(valid_B[:, None] > 0, own_BxV, logits_BxV), cache


@partial(jax.jit, static_argnames=('arch', 'sampling', 'dtype'), donate_argnames=('carry',))
def decode_piece(params: Any, carry: Any, arch: Arch, sampling: Sampling, dtype: Any) -> tuple[Any, jax.Array]:
    """PIECE decoding steps: (new carry, tokens [B, PIECE]). The carry is (logits, cache, seen tokens, keys)."""
    ones_B = jnp.ones(carry[0].shape[0], jnp.int32)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        logits_BxV, cache, seen_BxV, keys_B = carry
        split_Bx2 = jax.vmap(jax.random.split)(keys_B)
        token_B = draw(logits_BxV, seen_BxV, split_Bx2[:, 1], sampling).astype(jnp.int32)
        seen_BxV = seen_BxV | jax.nn.one_hot(token_B, seen_BxV.shape[1], dtype=bool)
        logits_BxV, cache = prefill.__wrapped__(params, token_B[:, None], cache, ones_B, logits_BxV, arch, dtype)
        return (logits_BxV, cache, seen_BxV, split_Bx2[:, 0]), token_B

    carry, tokens_NxB = jax.lax.scan(step, carry, None, length=PIECE)
    return carry, tokens_NxB.T


def stream(
    params: Any,
    arch: Arch,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    seeds: Sequence[int] | int = 0,
    dtype: Any = jnp.float32,
) -> Iterator[list[Completion]]:
    """Completions of all prompts as they grow, after every piece; the last is final.

    Text is cut before a stop string and at the end-of-text token. Raises UserError for an empty prompt or max_tokens < 1.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    if not encoded or min(map(len, encoded)) == 0:
        raise UserError('a prompt is empty; give at least one character')
    if max_tokens < 1:
        raise UserError(f'max_tokens={max_tokens} must be at least 1')
    seeds = [seeds + row for row in range(len(prompts))] if isinstance(seeds, int) else seeds
    decoding = Decoding(params, arch, encoded, max_tokens, sampling, seeds, dtype)
    raw: list[list[int]] = [[] for _ in prompts]
    while True:
        for tokens, new in zip(raw, decoding.piece().tolist(), strict=True):
            tokens.extend(new)
        completions = [finish_text(tokens[:max_tokens], tokenizer, stop, max_tokens) for tokens in raw]
        yield completions
        if all(completion.finish for completion in completions):
            return


def finish_text(tokens: list[int], tokenizer: Tokenizer, stop: Sequence[str], max_tokens: int) -> Completion:
    """The completion that some tokens make; `finish` is empty while more may come."""
    finish = 'length' if len(tokens) >= max_tokens else ''
    if tokenizer.eos_id in tokens:
        tokens, finish = tokens[: tokens.index(tokenizer.eos_id)], 'stop'
    text = tokenizer.decode(tokens)
    cuts = [text.index(string) for string in stop if string and string in text]
    if cuts:
        text, finish = text[: min(cuts)], 'stop'
    return Completion(text, tokens, finish)


def generate(
    params: Any,
    arch: Arch,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int = 128,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    seeds: Sequence[int] | int = 0,
    dtype: Any = jnp.float32,
) -> list[Completion]:
    """The finished completions of all prompts; arguments as of `stream`."""
    completions: list[Completion] = []
    for completions in stream(params, arch, tokenizer, prompts, max_tokens, sampling, stop, seeds, dtype):  # noqa: B007
        pass
    return completions
