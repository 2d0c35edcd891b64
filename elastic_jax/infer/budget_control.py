"""Elastic budget control: one size thinks, another answers (Star Elastic, arXiv 2605.07182).

At the switch the answering model recomputes: it prefills prompt and thoughts anew, so its caches are its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from elastic_jax.errors import UserError

Generate = Callable[..., str]


@dataclasses.dataclass(frozen=True)
class Thought:
    """What was thought and what was answered."""

    thinking: str
    answer: str


def think_then_answer(
    think: Generate,
    answer: Generate,
    prompt: str,
    thinking_tokens: int,
    max_tokens: int,
    opening: str = '<think>',
    closing: str = '</think>',
    **options: object,
) -> Thought:
    """Thinks with one model and answers with another.

    Args:
      think, answer: `Model.generate` of the two sizes.
      thinking_tokens: after so many the thinking is closed for it. max_tokens: of the answer.
      opening, closing: the delimiters around the thoughts; the opening one is put after the prompt.
    """
    if thinking_tokens < 1:
        raise UserError(f'thinking_tokens={thinking_tokens} must be at least 1')
    begun = f'{prompt}{opening}'
    thinking = think(begun, max_tokens=thinking_tokens, stop=(closing,), **options)
    answered = answer(f'{begun}{thinking}{closing}', max_tokens=max_tokens, **options)
    return Thought(thinking, answered)
