"""From tokens to text: ends, stop strings, and what may already be shown of a text that still grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Completion:
    """One prompt's continuation.

    Attributes:
      text: up to a stop string or a token that ends it. While more may come, it holds back what a stop string could still
        cut and a character of which bytes are missing, so that a later text only ever adds to it.
      tokens: as drawn, without the token that ended them; the last may reach into the stop string.
      finish: 'stop' (end of text or a stop string), 'length', or empty while more may come.
    """

    text: str
    tokens: list[int]
    finish: str


def complete(tokens: list[int], tokenizer: Tokenizer, stop: Sequence[str], max_tokens: int) -> Completion:
    """The completion that the tokens so far make."""
    tokens, finish = tokens[:max_tokens], 'length' if len(tokens) >= max_tokens else ''
    end = first_end(tokens, tokenizer)
    if end is not None:
        tokens, finish = tokens[:end], 'stop'
    text = tokenizer.decode(tokens)
    cut = first_stop(text, stop)
    if cut is not None:
        return Completion(text[:cut], tokens[: tokens_until(tokens, tokenizer, stop)], 'stop')
    return Completion(text if finish else settled(text, stop), tokens, finish)


def first_end(tokens: Sequence[int], tokenizer: Tokenizer) -> int | None:
    """Where the first token stands that ends what is generated."""
    return next((place for place, token in enumerate(tokens) if token in tokenizer.stop_ids), None)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    places = [text.index(string) for string in stop if string in text]
    return min(places) if places else None


def tokens_until(tokens: list[int], tokenizer: Tokenizer, stop: Sequence[str]) -> int:
    """How many tokens it takes until the text holds a stop string."""
    few, enough = 0, len(tokens)
    while enough - few > 1:
        middle = (few + enough) // 2
        if first_stop(tokenizer.decode(tokens[:middle]), stop) is None:
            few = middle
        else:
            enough = middle
    return enough


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of a growing text that later tokens cannot change."""
    text = text.rstrip('\ufffd')
    held = max((n for string in stop for n in range(1, len(string)) if text.endswith(string[:n])), default=0)
    return text[: len(text) - held]


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """The stop strings; raises UserError for an empty one or a bare string."""
    if isinstance(stop, str):
        raise UserError(f'stop={stop!r} is one string; give a list of strings')
    if '' in stop:
        raise UserError('a stop string is empty; leave it out')
    return tuple(stop)
