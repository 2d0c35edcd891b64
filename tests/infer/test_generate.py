"""Generation against full forward passes: every budget, any prompt length, any batch."""

import itertools
import re

import jax
import numpy as np
import pytest

from elastic_jax.errors import UserError, WorkError
from elastic_jax.infer import decoding
from elastic_jax.infer.decoding import Decoding, advance, chunk_sizes, empty_state, requests_of
from elastic_jax.infer.generate import generate, stream
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.speculative import generate_speculative
from tests.infer.tiny import (
    FAMILIES,
    HYBRID,
    LETTERS,
    budgets_of,
    ending_at,
    full_logits,
    greedy_by_full_passes,
    random_weights,
)

WARM = Sampling(temperature=1.0)
PENALTY = Sampling(repetition_penalty=1.5)
WEIGHTS = random_weights(HYBRID)


def letters(rng, count):
    return LETTERS.decode(rng.integers(0, 23, count))


@pytest.mark.parametrize('budget', ['full', 'small'])
@pytest.mark.parametrize('family', FAMILIES)
def test_decoding_gives_the_logits_of_full_passes_step_by_step(family, budget):
    """Prompts of unequal length in one batch: shorter and longer than the SSD chunk and than a prefill chunk."""
    weights = random_weights(FAMILIES[family], budgets_of(FAMILIES[family])[budget])
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 23, count) for count in (1, 13, 70)]
    batch = Decoding(weights, requests_of([WARM] * 3, [5, 6, 7]), 90, [12] * 3)
    batch.feed(prompts)
    held = [list(prompt) for prompt in prompts]
    for _ in range(12):
        for row, tokens in enumerate(held):
            full = full_logits(weights, tokens)
            np.testing.assert_allclose(batch.state.logits_BxV[row], full[-1], atol=1e-5 * np.abs(full).max())
        for tokens, new in zip(held, batch.piece(1), strict=True):
            tokens += new
    assert [len(tokens) for tokens in held] == [13, 25, 82]


@pytest.mark.parametrize(('family', 'budget'), [('hybrid', 'mid'), ('moe', 'small')])
def test_greedy_tokens_are_those_of_full_passes(family, budget):
    weights = random_weights(FAMILIES[family], budgets_of(FAMILIES[family])[budget])
    prompt = letters(np.random.default_rng(4), 9)
    (completion,) = generate(weights, LETTERS, [prompt], max_tokens=20)
    expected = greedy_by_full_passes(weights, LETTERS.encode(prompt), 20)
    ended = LETTERS.eos_id in expected
    assert completion.tokens == (expected[:-1] if ended else expected)
    assert completion.finish == ('stop' if ended else 'length')


def test_a_batch_of_unequal_prompts_is_each_alone():
    """Rows of other lengths, settings, seeds and limits change nothing; nor do rows that ended."""
    rng = np.random.default_rng(5)
    prompts = [letters(rng, count) for count in (3, 40, 17)]
    samplings = [Sampling(), Sampling(1.0, top_k=5), Sampling(1.5, top_p=0.8, repetition_penalty=1.3)]
    together = generate(WEIGHTS, LETTERS, prompts, 40, samplings, seeds=[1, 2, 3])
    for row, prompt in enumerate(prompts):
        (alone,) = generate(WEIGHTS, LETTERS, [prompt], 40, samplings[row], seeds=[row + 1])
        assert together[row] == alone
    assert len({completion.text for completion in together}) == 3


def test_a_seed_gives_the_same_text_again_and_another_seed_another():
    texts = [generate(WEIGHTS, LETTERS, ['abc'], 30, WARM, seeds=[seed])[0].text for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    first, second = generate(WEIGHTS, LETTERS, ['abc', 'abc'], 30, WARM, seeds=6)
    assert second.text == texts[0] != first.text
    assert generate(WEIGHTS, LETTERS, ['abc'], 30, WARM, seeds=np.int64(7))[0].text == texts[0]


def test_a_prompt_longer_than_the_largest_chunk_is_prefilled_in_several():
    prompt = np.random.default_rng(6).integers(0, 23, 300)
    assert len(set(chunk_sizes(300))) > 1 and max(chunk_sizes(300)) < 300
    batch = Decoding(WEIGHTS, requests_of([WARM], [0]), 310, [10])
    batch.feed([prompt])
    full = full_logits(WEIGHTS, prompt)
    np.testing.assert_allclose(batch.state.logits_BxV[0], full[-1], atol=1e-5 * np.abs(full).max())


def long_text():
    """(seed, text) of the first random text that does not end by itself early."""
    texts = ((seed, generate(WEIGHTS, LETTERS, ['abc'], 60, WARM, seeds=[seed])[0].text) for seed in range(100))
    return next((seed, text) for seed, text in texts if len(text) > 35)


def test_text_ends_before_a_stop_string_wherever_pieces_end():
    seed, whole = long_text()
    for place in (1, 14, 15, 16, 17, 30):
        string = whole[place : place + 3]
        (stopped,) = generate(WEIGHTS, LETTERS, ['abc'], 60, WARM, stop=['zzz', string], seeds=[seed])
        assert stopped.text == whole[: whole.index(string)] and stopped.finish == 'stop'
        assert LETTERS.decode(stopped.tokens) == stopped.text + string


def test_streamed_texts_only_grow_and_end_in_the_whole():
    seed, whole = long_text()
    stop = [whole[20:23]]
    shown = [texts[0] for texts in stream(WEIGHTS, LETTERS, ['abc'], 60, WARM, stop, seeds=[seed])]
    assert len(shown) > 2 and len(shown[0].text) <= 1
    for before, after in itertools.pairwise(shown):
        assert after.text.startswith(before.text)
    assert shown[-1].text == whole[: whole.index(stop[0])]
    assert [bool(completion.finish) for completion in shown] == [False] * (len(shown) - 1) + [True]


def test_the_end_of_text_ends_a_row_and_is_not_shown():
    found = [generate(WEIGHTS, LETTERS, ['abc'], 60, Sampling(3.0), seeds=[seed])[0] for seed in range(8)]
    ended = [completion for completion in found if completion.finish == 'stop']
    assert ended and all(LETTERS.eos_id not in completion.tokens for completion in found)
    assert all(len(completion.text) == len(completion.tokens) for completion in found)


def test_any_of_several_tokens_ends_a_row():
    prompts, seeds, three = ['abc', 'klm', 'v', 'xyw'], [3, 4, 5, 6], ending_at(23, 4, 9)
    endless = generate(WEIGHTS, ending_at(), prompts, 40, WARM, seeds=seeds)
    assert [len(row.tokens) for row in endless] == [40] * 4
    ends = [next(n for n, token in enumerate(row.tokens) if token in three.stop_ids) for row in endless]
    assert len({row.tokens[end] for row, end in zip(endless, ends, strict=True)}) > 1
    found = generate(WEIGHTS, three, prompts, 40, WARM, seeds=seeds)
    assert [done.tokens for done in found] == [row.tokens[:end] for row, end in zip(endless, ends, strict=True)]
    assert {done.finish for done in found} == {'stop'}
    drafted, _ = generate_speculative(WEIGHTS, WEIGHTS, three, prompts, max_tokens=40, sampling=PENALTY)
    assert drafted == generate(WEIGHTS, three, prompts, 40, PENALTY)


def test_other_requests_compile_nothing_new():
    run = lambda *args, **kwargs: generate(WEIGHTS, LETTERS, *args, **kwargs)
    run(['abcdefgh'], 20)
    counts = decoding.advance._cache_size(), decoding.feed_chunk._cache_size()
    run(['abc'], 7, Sampling(0.7, 3, 0.9, 1.2), stop=['q'], seeds=9)
    run(['abcdefghijkl'], 25, WARM, seeds=10)
    assert (decoding.advance._cache_size(), decoding.feed_chunk._cache_size()) == counts


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (([],), 'a prompt is empty'),
        ((['a', ''],), 'a prompt is empty'),
        ((['a\udcff'],), 'a prompt is no Unicode text'),
        ((['a'], 0), 'max_tokens=0 must be at least 1'),
        ((['a'], 3_000_000_000), 'max_tokens=3000000000 must be at most 268435456'),
        ((['a'], 1, [WARM, WARM]), '2 samplings for 1 prompts'),
        ((['a'], 1, WARM, 'ab'), 'give a list of strings'),
        ((['a'], 1, WARM, ['']), 'a stop string is empty'),
        ((['a'], 1, WARM, (), [1, 2]), '2 seeds for 1 prompts'),
    ],
)
def test_mistakes_are_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message):
        generate(WEIGHTS, LETTERS, *arguments)


def test_caches_that_do_not_fit_in_memory_are_said_in_one_sentence(monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.')

    monkeypatch.setattr(decoding, '_empty_state', full)
    with pytest.raises(WorkError, match='the caches of 1 rows of 1024 tokens do not fit in memory'):
        generate(WEIGHTS, LETTERS, ['abc'], 900)


@pytest.mark.parametrize('rows', [1, 2])
def test_a_decoding_step_copies_no_keys_and_no_values(rows):
    weights = random_weights(FAMILIES['dense'])
    state = empty_state(weights, requests_of([Sampling()] * rows, [0] * rows), 96, [1] * rows)
    text = advance.lower(weights, state, np.int32(16)).compile().as_text()
    copies = re.findall(rf' = f32\[{rows},\d+,(?:\d+,96|96,\d+)\]\S* copy\(', text)
    assert not copies, f'{len(copies)} copies'
