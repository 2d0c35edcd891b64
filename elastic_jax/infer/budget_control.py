"""Elastic budget control: one size thinks, another answers (Star Elastic, arXiv 2605.07182).

A row thinks until its closing delimiter, its limit, or, by the rule of entropy, until the thinking size is unsure of its next
token: then the answering size thinks on in its place. At the switch the answering size either recomputes (prefills prompt and
thoughts anew: exact) or is handed the thinking size's cache (`handover.py`: cheaper, approximate) and runs only the last tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.errors import UserError
from elastic_jax.infer.clock import Clock
from elastic_jax.infer.decoding import PIECE, Decoding, Requests, requests_of
from elastic_jax.infer.generate import GREEDY, check_count, encode_prompts, per_prompt, seeds_of
from elastic_jax.infer.handover import FILLS, hand_over
from elastic_jax.infer.resident import Weights
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.text import (
    Completion,
    Reader,
    check_stop,
    encode_within,
    first_end,
    first_stop,
    settled,
    text_after,
    tokens_until,
)

SWITCHES = ('recompute', 'hand-over')


@dataclasses.dataclass(frozen=True)
class Control:
    """How thinking is limited and handed on.

    Attributes:
      thinking_tokens: after so many the thinking is closed for it. max_tokens: of the answer.
      opening, closing: the delimiters around the thoughts; the opening one is put after the prompt.
      switch: 'recompute' or 'hand-over'. fill: the rule for heads that the thinking size lacks ('zero' or 'mean').
      entropy: in nats; the answering size takes over the thinking before a token less certain than this. None: never.
    """

    thinking_tokens: int = 256
    max_tokens: int = 128
    opening: str = '<think>'
    closing: str = '</think>'
    switch: str = 'recompute'
    fill: str = 'zero'
    entropy: float | None = None

    def __post_init__(self) -> None:
        for name in ('thinking_tokens', 'max_tokens'):
            check_count(name, getattr(self, name))
        for name, known in (('switch', SWITCHES), ('fill', FILLS)):
            if getattr(self, name) not in known:
                raise UserError(f'{name}={getattr(self, name)!r} is unknown; give one of {", ".join(known)}')
        if not self.closing:
            raise UserError('the closing delimiter is empty; give the text that ends a thought, such as </think>')
        if self.entropy is not None and not self.entropy >= 0:
            raise UserError(f'entropy={self.entropy} must be at least 0 nats')


@dataclasses.dataclass(frozen=True)
class Thought:
    """What was thought and what was answered.

    Attributes:
      thinking: without its delimiters.
      thinking_tokens: drawn by the thinking size. continued_tokens: thoughts drawn by the answering size, where it took over.
    """

    thinking: str
    answer: Completion
    thinking_tokens: int
    continued_tokens: int


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one batch, compilation left out. `to_answer`: from the request to the answers' first tokens."""

    thinking: float
    switch: float
    answer: float
    to_answer: float

    def to_json(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def think_then_answer(
    think: Weights,
    answer: Weights,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    control: Control,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop: Sequence[str] = (),
    seeds: Sequence[int] | int = 0,
) -> tuple[list[Thought], Timing]:
    """Thinks with one size and answers with another, all prompts together.

    Args:
      stop: strings before which an answer ends; the others as of `generate`.
    """
    stop, clock = check_stop(stop), Clock()
    begun = [row.tolist() for row in encode_prompts(tokenizer, [f'{prompt}{control.opening}' for prompt in prompts])]
    requests = requests_of(per_prompt(sampling, prompts), seeds_of(seeds, prompts), tokenizer.stop_ids)
    closing = closing_of(control.closing, tokenizer)
    capacity = max(map(len, begun)) + closing.room(control.thinking_tokens) + PIECE + control.max_tokens
    limits = [control.thinking_tokens] * len(prompts)

    limit = float('inf') if control.entropy is None else control.entropy
    unsure = requests._replace(entropy_B=np.full(len(prompts), limit, np.float32))
    decoding = Decoding(think, unsure, capacity, limits)
    decoding.feed([row[:-1] for row in begun])
    decoding.mark(range(len(prompts)))
    decoding.feed([row[-1:] for row in begun])
    thoughts = _think(decoding, begun, tokenizer, control.thinking_tokens, closing)
    first = [thought.drawn for thought in thoughts]
    thinking_seconds = clock.lap()

    held = [row + thought.tokens for row, thought in zip(begun, thoughts, strict=True)]
    if control.switch == 'recompute':
        decoding = Decoding(answer, requests, capacity, limits)
        decoding.feed(held)
    else:
        decoding = _handed(decoding, held, answer, requests, control.fill)
    jax.block_until_ready(decoding.state.logits_BxV)
    switch_seconds = clock.lap()

    continued = [0] * len(prompts)
    if not all(thought.closed for thought in thoughts):
        decoding.allow([0 if thought.closed else control.thinking_tokens - thought.drawn for thought in thoughts], first)
        decoding.mark(range(len(prompts)))
        thoughts = _think(decoding, begun, tokenizer, control.thinking_tokens, closing, thoughts)
        continued = [thought.drawn - count for thought, count in zip(thoughts, first, strict=True)]
        _become(decoding, [row + thought.tokens for row, thought in zip(begun, thoughts, strict=True)])
    continued_seconds = clock.lap()

    decoding.allow([control.max_tokens] * len(prompts), [thought.drawn for thought in thoughts])
    answers, to_first = _answer(decoding, tokenizer, control, stop)
    timing = Timing(
        thinking_seconds + continued_seconds,
        switch_seconds,
        clock.seconds(),
        thinking_seconds + switch_seconds + continued_seconds + to_first,
    )
    texts = [shown_thoughts(row, thought, tokenizer, closing) for row, thought in zip(begun, thoughts, strict=True)]
    return [Thought(*each) for each in zip(texts, answers, first, continued, strict=True)], timing


@dataclasses.dataclass(frozen=True)
class Closing:
    """The delimiter that ends thoughts, as tokens that go on a text. `hidden`: no text shows it, as it is a special token."""

    text: str
    tokens: list[int]
    hidden: bool

    def room(self, thinking_tokens: int) -> int:
        """How many tokens thoughts and their end may take: an end inside a token is written anew, which may take more."""
        return thinking_tokens + 2 * len(self.tokens)


def closing_of(text: str, tokenizer: Tokenizer) -> Closing:
    """The delimiter of this text."""
    tokens = encode_within(text, tokenizer)
    return Closing(text, tokens, text not in text_after(tokens, tokens, tokenizer))


@dataclasses.dataclass(frozen=True)
class Thoughts:
    """A row's thoughts: its tokens (with the closing delimiter once closed), and how many of them were drawn."""

    tokens: list[int]
    drawn: int
    closed: bool


def _think(
    decoding: Decoding,
    begun: list[list[int]],
    tokenizer: Tokenizer,
    limit: int,
    closing: Closing,
    known: list[Thoughts] | None = None,
) -> list[Thoughts]:
    """Decodes until every row has closed its thoughts or waits, unsure; closed ones that are `known` stay as they are."""
    rows = range(len(begun))
    thoughts = known or [Thoughts([], 0, False)] * len(begun)
    while True:
        thinking = [row for row in rows if not thoughts[row].closed]
        decoding.piece()
        now = [thoughts_of(begun[row], decoding.tokens[row][len(begun[row]) :], tokenizer, limit, closing) for row in thinking]
        thoughts = [now[thinking.index(row)] if row in thinking else thoughts[row] for row in rows]
        going = [row for row in thinking if not thoughts[row].closed and decoding.going[row]]
        if not going:
            return thoughts
        decoding.allow([left if row in going else 0 for row, left in enumerate(decoding.left)])
        decoding.mark(going)


def thoughts_of(begun: Sequence[int], drawn: list[int], tokenizer: Tokenizer, limit: int, closing: Closing) -> Thoughts:
    """What is drawn after the tokens `begun`, as thoughts; closed by themselves, by the end of text, or by the limit."""
    end = first_end(drawn, tokenizer)
    # A piece may hold the delimiter, an answer and the end of the text: what comes first counts.
    drawn = drawn[:end]
    text_of = lambda tokens: text_after(begun, tokens, tokenizer)
    text = text_of(drawn)
    cut = first_stop(text, [closing.text])
    if closing.hidden:
        lengths = range(len(closing.tokens), len(drawn) + 1)
        count = next((count for count in lengths if drawn[count - len(closing.tokens) : count] == closing.tokens), None)
        if count is not None:
            return Thoughts(drawn[:count], count, True)
    elif cut is not None:
        count = tokens_until(drawn, text_of, [closing.text])
        closed = text[: cut + len(closing.text)]
        if text_of(drawn[:count]) == closed:
            return Thoughts(drawn[:count], count, True)
        # The last token reaches past the delimiter: its part of it is written anew.
        rest = closed[len(text_of(drawn[: count - 1])) :]
        return Thoughts(drawn[: count - 1] + encode_within(rest, tokenizer), count, True)
    if end is not None or len(drawn) >= limit:
        return Thoughts(drawn + closing.tokens, len(drawn), True)
    return Thoughts(drawn, len(drawn), False)


def shown_thoughts(begun: Sequence[int], thoughts: Thoughts, tokenizer: Tokenizer, closing: Closing) -> str:
    """What may be shown of the thoughts after the tokens `begun`: without their delimiter, or what may become one."""
    text = text_after(begun, thoughts.tokens, tokenizer)
    return text.partition(closing.text)[0] if thoughts.closed else settled(text, [closing.text])


def kept_of(have: list[int], want: list[int]) -> int:
    """How much of `want` a row may keep: the last token is run again, for the logits of the next one."""
    same = next((i for i, (a, b) in enumerate(zip(have, want, strict=False)) if a != b), len(have))
    return min(same, len(want) - 1)


def _become(decoding: Decoding, held: list[list[int]]) -> None:
    """Makes every row hold these tokens."""
    kept = [len(want) if have == want else kept_of(have, want) for have, want in zip(decoding.tokens, held, strict=True)]
    decoding.back_to(kept)
    decoding.feed([row[count:] for row, count in zip(held, kept, strict=True)])


def _handed(decoding: Decoding, held: list[list[int]], taker: Weights, requests: Requests, fill: str) -> Decoding:
    """The taker's decoding of what the rows should hold, from the giver's cache."""
    kept = [kept_of(have, want) for have, want in zip(decoding.tokens, held, strict=True)]
    decoding.back_to(kept)
    result = Decoding(taker, requests, decoding.capacity, [0] * decoding.rows)
    cache = hand_over(decoding.state.cache, decoding.weights.arch, taker, result.slots, fill)
    result.state = result.state._replace(cache=cache, seen_BxV=decoding.state.seen_BxV)
    result.tokens = decoding.tokens
    result.feed([row[count:] for row, count in zip(held, kept, strict=True)])
    return result


def _answer(decoding: Decoding, tokenizer: Tokenizer, control: Control, stop: tuple[str, ...]) -> tuple[list[Completion], float]:
    """(answers, seconds until the first tokens of all)."""
    clock, readers = Clock(), [Reader(tokenizer, stop, control.max_tokens, row) for row in decoding.tokens]
    drawn = decoding.piece(1)
    to_first = clock.seconds()
    while True:
        answers = [reader.read(new) for reader, new in zip(readers, drawn, strict=True)]
        if all(answer.finish for answer in answers):
            return answers, to_first
        decoding.allow([0 if answer.finish else left for answer, left in zip(answers, decoding.left, strict=True)])
        drawn = decoding.piece()


def agreement(one: Sequence[Thought], other: Sequence[Thought]) -> float:
    """The share of answer tokens, place by place, in which two ways of answering the same thoughts agree."""
    same = total = 0
    for a, b in zip(one, other, strict=True):
        total += max(len(a.answer.tokens), len(b.answer.tokens))
        same += sum(x == y for x, y in zip(a.answer.tokens, b.answer.tokens, strict=False))
    return same / total if total else 1.0
