"""A reasoning task made on the spot: chains of arithmetic on digits, worked out step by step between delimiters.

  4+7*3-8=<+7=1*3=3-8=5.>5

A chain is read from left to right and every value is taken modulo 10. Its difficulty is its number of operations. Without the
thoughts the answer needs all steps at once; with some of them, the rest. A full stop ends thoughts that are complete: the answer
then is their last value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

OPENING, CLOSING, COMPLETE = '<', '>', '.'
# What the assistant says is scored, what it is asked and given is not.
TEMPLATE = (
    '{% for message in messages %}{% if message.role == "assistant" %}{% generation %}{{ message.content }}{% endgeneration %}'
    '{% else %}{{ message.content }}{% endif %}{% endfor %}'
)
HELDOUT_NUMBERS = 0.1
STEP = 4  # characters, which are tokens, of a step's thoughts


@dataclasses.dataclass(frozen=True)
class Chain:
    """Digits and the operations between them."""

    numbers: tuple[int, ...]
    operations: str

    @property
    def question(self) -> str:
        return ''.join(map(str, self.numbers[:1])) + ''.join(f'{o}{n}' for o, n in self._steps()) + '='

    @property
    def values(self) -> list[int]:
        """The value after every operation."""
        found = [self.numbers[0]]
        for operation, number in self._steps():
            found.append(_APPLY[operation](found[-1], number) % 10)
        return found[1:]

    @property
    def thoughts(self) -> str:
        steps = zip(self._steps(), self.values, strict=True)
        return ''.join(f'{o}{n}={value}' for (o, n), value in steps) + COMPLETE

    @property
    def answer(self) -> str:
        return str(self.values[-1])

    @property
    def held_out(self) -> bool:
        """Whether the chain's numbers are kept from training, whatever the operations between them."""
        digest = hashlib.blake2b(bytes(self.numbers), digest_size=8).digest()
        return int.from_bytes(digest, 'big') / 2**64 < HELDOUT_NUMBERS

    def _steps(self) -> Iterator[tuple[str, int]]:
        return zip(self.operations, self.numbers[1:], strict=True)


_APPLY = {'+': lambda a, b: a + b, '-': lambda a, b: a - b, '*': lambda a, b: a * b}


def chains(lengths: Sequence[int], count: int, held_out: bool, seed: int) -> list[Chain]:
    """Random chains of `lengths` operations, as many of each; either all or none of them of held-out numbers."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        length = lengths[len(found) % len(lengths)]
        numbers = tuple(rng.randint(1, 9) for _ in range(length + 1))
        chain = Chain(numbers, ''.join(rng.choices('+-*', k=length)))
        if chain.held_out == held_out:
            found.append(chain)
    return found


def thinking(chain: Chain, rng: random.Random) -> list[dict[str, str]]:
    """How thinking is taught: all thoughts, or, half of the time, an answer after a part of them."""
    say = lambda role, content: {'role': role, 'content': content}
    asked, thoughts = say('user', chain.question + OPENING), chain.thoughts
    if rng.random() < 0.5:
        return [asked, say('assistant', thoughts + CLOSING + chain.answer)]
    part = thoughts[: rng.randrange(len(thoughts))]
    return [asked, say('assistant', part), say('user', CLOSING), say('assistant', chain.answer)]


def answering(chain: Chain, rng: random.Random) -> list[dict[str, str]]:
    """How answering is taught: one in five with all its thoughts; the others by the answer alone, after none to all of the steps.

    What is taught is then mostly the answer, of which a chain has one token against four of every step of the thoughts.
    """
    say = lambda role, content: {'role': role, 'content': content}
    asked = chain.question + OPENING
    if rng.random() < 0.2:
        return [say('user', asked), say('assistant', chain.thoughts + CLOSING + chain.answer)]
    steps = rng.randint(0, len(chain.operations) + 1)  # the last: complete, and said so
    return [say('user', asked + chain.thoughts[: STEP * steps] + CLOSING), say('assistant', chain.answer)]


LESSONS = {'thinking': thinking, 'answering': answering}


def write_data(folder: Path, lengths: Sequence[int], count: int, seed: int) -> dict[str, dict[str, Any]]:
    """Writes both lessons' chats and their template; returns, for each, the keys of `config.data` that read it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'template.jinja').write_text(TEMPLATE)
    rng, found = random.Random(seed), chains(lengths, count, False, seed)
    keys = {}
    for name, lesson in LESSONS.items():
        path = folder / f'{name}.jsonl'
        path.write_text('\n'.join(json.dumps({'chat': lesson(chain, rng)}) for chain in found) + '\n')
        keys[name] = {
            'path': str(path),
            'field': 'chat',
            'chat_template': str(folder / 'template.jinja'),
            'loss': 'answers',
            'packing': 'whole',
            'heldout_fraction': 0.01,
        }
    return keys
