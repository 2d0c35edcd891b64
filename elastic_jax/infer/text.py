"""From tokens to text: ends, stop strings, and what may already be shown of a text that still grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.errors import UserError

# How many tokens before a place are looked at for the text after it. A tokenizer may leave out the space that begins a text, and
# a character may have begun before the place.
CONTEXT = 8
# What text stands after when its tokens within a longer one are wanted; which of these joins no token of it is tried out.
NEIGHBOURS = ('\n', 'a', '.', '0')


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


class Reader:
    """Reads one row's completion as its tokens come: each is decoded a few times, however long the text grows.

    Args:
      before: the tokens that the row held before.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], max_tokens: int, before: Sequence[int] = ()):
        self._tokenizer, self._stop, self._max_tokens = tokenizer, stop, max_tokens
        self._longest = max(map(len, stop), default=0)
        self._tokens: list[int] = []
        # The text of all tokens but the `_rest`, before which `_before` stand.
        self._text, self._rest, self._before = '', [], [int(token) for token in before[-CONTEXT:]]
        self._done: Completion | None = None

    def read(self, new: Sequence[int]) -> Completion:
        """The completion that the tokens so far and these make; what comes after its end is left out."""
        if self._done is None or not self._done.finish:
            self._done = self._read(list(new[: self._max_tokens - len(self._tokens)]))
        return self._done

    def _read(self, new: list[int]) -> Completion:
        end = first_end(new, self._tokenizer)
        finish = 'stop' if end is not None else 'length' if len(self._tokens) + len(new) == self._max_tokens else ''
        self._tokens += new[:end]
        self._rest += new[:end]
        text_of = lambda tokens: self._text + text_after(self._before, tokens, self._tokenizer)
        text = text_of(self._rest)
        if first_stop(text[max(0, len(self._text) - self._longest) :], self._stop) is not None:
            # The one that is complete first ends the text, however many tokens came at once.
            count = tokens_until(self._rest, text_of, self._stop)
            text = text_of(self._rest[:count])
            tokens = self._tokens[: len(self._tokens) - len(self._rest) + count]
            return Completion(text[: first_stop(text, self._stop)], tokens, 'stop')
        if not text.endswith('\ufffd'):
            self._text, self._rest, self._before = text, [], [*self._before, *self._rest][-CONTEXT:]
        return Completion(text if finish else settled(text, self._stop), list(self._tokens), finish)


def text_after(before: Sequence[int], tokens: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text that tokens add to others."""
    before = [int(token) for token in before[-CONTEXT:]]
    known, whole = tokenizer.decode(before), tokenizer.decode([*before, *tokens])
    # Where `before` ends within a character, that character is part of what is added.
    same = next((i for i, (a, b) in enumerate(zip(known, whole, strict=False)) if a != b), len(known))
    return whole[same:]


def encode_within(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of a text that goes on another: a tokenizer may begin every text of its own with a space."""
    for neighbour in NEIGHBOURS:
        first, both = tokenizer.encode(neighbour).tolist(), tokenizer.encode(neighbour + text).tolist()
        if both[: len(first)] == first:
            return both[len(first) :]
    return tokenizer.encode(text).tolist()


def first_end(tokens: Sequence[int], tokenizer: Tokenizer) -> int | None:
    """Where the first token stands that ends what is generated."""
    return next((place for place, token in enumerate(tokens) if token in tokenizer.stop_ids), None)


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    places = [text.index(string) for string in stop if string in text]
    return min(places) if places else None


def tokens_until(tokens: list[int], text_of: Callable[[list[int]], str], stop: Sequence[str]) -> int:
    """How many tokens it takes until the text, which holds a stop string in the end, holds one."""
    few, enough = 0, len(tokens)
    while enough - few > 1:
        middle = (few + enough) // 2
        if first_stop(text_of(tokens[:middle]), stop) is None:
            few = middle
        else:
            enough = middle
    return enough


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of a growing text that later tokens cannot change."""
    text = text.rstrip('\ufffd')
    held = 0
    for string in stop:
        # The longest end of the text that begins a stop string; of a long string no more than the text has.
        lengths = range(min(len(string) - 1, len(text)), held, -1)
        held = next((n for n in lengths if text.endswith(string[:n])), held)
    return text[: len(text) - held]


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """The stop strings; raises UserError for an empty one or a bare string."""
    if isinstance(stop, str):
        raise UserError(f'stop={stop!r} is one string; give a list of strings')
    if '' in stop:
        raise UserError('a stop string is empty; leave it out')
    return tuple(stop)
