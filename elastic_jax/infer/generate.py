"""Text from one model: prompts in, completions out, whole or as they grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.errors import UserError
from elastic_jax.infer.decoding import PIECE, Decoding, requests_of
from elastic_jax.infer.resident import Weights
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.text import Completion, Reader, check_stop

GREEDY = Sampling()
# More than any model's context, and few enough that what is asked for together is counted in an int32.
MOST_TOKENS = 2**28


def stream(
    weights: Weights,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int = 128,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop: Sequence[str] = (),
    seeds: Sequence[int] | int = 0,
) -> Iterator[list[Completion]]:
    """Completions of all prompts as they grow; the last is final.

    Args:
      sampling: one for all prompts, or one for each. seeds: one for each prompt, or that of the first, which the others follow.
      stop: strings before which a text is cut.
    Raises: UserError for an empty prompt or stop string, or max_tokens out of bounds.
    """
    encoded = encode_prompts(tokenizer, prompts)
    check_count('max_tokens', max_tokens)
    stop = check_stop(stop)
    requests = requests_of(per_prompt(sampling, prompts), seeds_of(seeds, prompts), tokenizer.stop_ids)
    longest = max(map(len, encoded))
    decoding = Decoding(weights, requests, longest + max_tokens, [max_tokens] * len(prompts))
    decoding.feed(encoded)
    readers = [Reader(tokenizer, stop, max_tokens, row) for row in encoded]
    steps = 1  # The first token is shown as soon as it is there.
    while True:
        completions = [reader.read(new) for reader, new in zip(readers, decoding.piece(steps), strict=True)]
        yield completions
        if all(completion.finish for completion in completions):
            return
        decoding.allow([0 if done.finish else left for done, left in zip(completions, decoding.left, strict=True)])
        steps = PIECE


def generate(
    weights: Weights,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int = 128,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    stop: Sequence[str] = (),
    seeds: Sequence[int] | int = 0,
) -> list[Completion]:
    """The finished completions of all prompts; arguments as of `stream`."""
    completions: list[Completion] = []
    for completions in stream(weights, tokenizer, prompts, max_tokens, sampling, stop, seeds):  # noqa: B007
        pass
    return completions


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of every prompt. Raises UserError when there is none, or one is empty or no Unicode text."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # bytes of a command line that are no UTF-8 come as lone surrogates
            raise UserError(f'a prompt is no Unicode text ({error}); give it in UTF-8') from error
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    if not encoded or min(map(len, encoded)) == 0:
        raise UserError('a prompt is empty; give at least one character')
    return encoded


def check_count(name: str, count: int, most: int = MOST_TOKENS) -> None:
    """Raises UserError for a number of tokens that is below 1 or above `most`."""
    if count < 1:
        raise UserError(f'{name}={count} must be at least 1')
    if count > most:
        raise UserError(f'{name}={count} must be at most {most}')


def per_prompt(sampling: Sampling | Sequence[Sampling], prompts: Sequence[str]) -> list[Sampling]:
    """One Sampling for each prompt."""
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != len(prompts):
        raise UserError(f'{len(samplings)} samplings for {len(prompts)} prompts; give one, or one for each')
    return samplings


def seeds_of(seeds: Sequence[int] | int, prompts: Sequence[str]) -> list[int]:
    """One seed for each prompt."""
    own = [seeds + row for row in range(len(prompts))] if isinstance(seeds, int | np.integer) else list(seeds)
    if len(own) != len(prompts):
        raise UserError(f'{len(own)} seeds for {len(prompts)} prompts; give one, or one for each')
    return own
