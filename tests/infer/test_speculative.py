"""Speculation against the larger size alone: greedy tokens are its own, sampled ones follow its distribution exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.arch import Arch, Mamba
from elastic_jax.errors import UserError
from elastic_jax.infer.decoding import Decoding, requests_of
from elastic_jax.infer.generate import generate
from elastic_jax.infer.resident import weights_of
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.speculative import begin, generate_speculative, speculate, stream_speculative
from elastic_jax.model.cache import cached_logits, init_cache, settle_cache
from elastic_jax.model.decoder import Decoder
from tests.infer.test_sampling import expected as definition
from tests.infer.tiny import FAMILIES, HYBRID, LETTERS, full_logits, random_weights, small_of
from tests.tiny import FAMILIES as ALL_FAMILIES
from tests.tiny import numpy_params

PROMPTS = ['abcde', 'fghijklmnopqrstu', 'v']
PENALTY = Sampling(repetition_penalty=1.3)


@pytest.mark.parametrize('family', ['hybrid', 'dense'])
def test_greedy_tokens_are_those_of_the_larger_size(family):
    """A penalty keeps the text from repeating itself: every row has kept and refused drafts."""
    arch = FAMILIES[family]
    large, small = random_weights(arch), random_weights(arch, small_of(arch))
    expected = generate(large, LETTERS, PROMPTS, 30, PENALTY)
    found, tally = generate_speculative(large, small, LETTERS, PROMPTS, drafts=3, max_tokens=30, sampling=PENALTY)
    assert found == expected
    assert tally.tokens == sum(len(done.tokens) + (done.finish == 'stop') for done in expected)


@pytest.mark.parametrize('drafts', [1, 3])
def test_a_size_that_drafts_for_itself_is_always_kept(drafts):
    weights = random_weights(HYBRID, small_of(HYBRID))
    for sampling in (Sampling(), Sampling(1.0, repetition_penalty=1.2)):
        found, tally = generate_speculative(weights, weights, LETTERS, ['abc'], drafts=drafts, max_tokens=40, sampling=sampling)
        assert tally.acceptance == 1.0 or found[0].finish == 'stop'
        assert tally.rounds == -(-(tally.tokens - 1) // (drafts + 1))
    (alone,) = generate(weights, LETTERS, ['abc'], 40)
    (found,), _ = generate_speculative(weights, weights, LETTERS, ['abc'], drafts=drafts, max_tokens=40)
    assert found == alone


class Five:
    """A tokenizer of five letters without an end of text."""

    vocab_size, eos_id, stop_ids, spec = 5, 5, (5,), {'kind': 'letters'}

    encode = LETTERS.encode
    decode = LETTERS.decode


TINY = Arch.from_pattern(
    'M*', vocab=5, embed=8, mamba=Mamba(heads=2, head_dim=4, groups=1, state=4), attention=FAMILIES['dense'].mixers[0]
)
ROWS = 8192


@pytest.mark.parametrize('sampling', [Sampling(1.0), Sampling(1.5, top_k=4, repetition_penalty=1.5), Sampling(0.8, top_p=0.9)])
def test_sampled_text_has_exactly_the_larger_sizes_distribution(sampling):
    """Three tokens of very many rows against the product of the larger size's own conditional distributions."""
    large, small = (weights_of(numpy_params(TINY, seed=seed), TINY) for seed in (1, 2))
    # Related, but not alike: drafts are kept now and then.
    mixed = jax.tree.map(lambda a, b: 0.8 * a + 0.4 * b, large.params, small.params)
    large, small = weights_of(jax.tree.map(lambda a: 2.0 * a, large.params), TINY), weights_of(mixed, TINY)
    found, tally = generate_speculative(large, small, Five(), ['abcd'] * ROWS, drafts=2, max_tokens=3, sampling=sampling)
    assert 0.2 < tally.acceptance < 0.9
    expected = exact(large, [0, 1, 2, 3], sampling, 3)
    other = exact(small, [0, 1, 2, 3], sampling, 3)
    counts = dict.fromkeys(expected, 0)
    for completion in found:
        counts[tuple(completion.tokens)] += 1
    assert chi_square(counts, expected) < 1
    assert chi_square(counts, other) > 5  # The test has the power to tell the two sizes apart.


def exact(weights, prompt, sampling, length):
    """Probability of every continuation of some length, from full passes and the definitions."""
    texts = np.asarray([[*prompt, *rest] for rest in itertools.product(range(5), repeat=length)])
    logits = np.asarray(jax.jit(Decoder(TINY).apply)({'params': weights.params}, texts), np.float64)
    result = {}
    for text, text_logits in zip(texts.tolist(), logits, strict=True):
        probability = 1.0
        for place in range(len(prompt), len(text)):
            probability *= definition(text_logits[place - 1], np.isin(range(5), text[:place]), sampling)[text[place]]
        result[tuple(text[len(prompt) :])] = probability
    assert abs(sum(result.values()) - 1) < 1e-6
    return result


def chi_square(counts, expected):
    """Pearson's statistic over its 99.99 % quantile; cells of few expected counts are one cell."""
    cells = [(counts[text], probability * ROWS) for text, probability in expected.items()]
    large = [(count, want) for count, want in cells if want >= 5]
    few = [sum(cell) for cell in zip(*((c, w) for c, w in cells if w < 5), strict=True)] or [0, 0]
    if few[1] >= 1:
        large.append(tuple(few))
    statistic = sum((count - want) ** 2 / want for count, want in large)
    degrees = len(large) - 1
    quantile = degrees * (1 - 2 / (9 * degrees) + 3.719 * np.sqrt(2 / (9 * degrees))) ** 3  # Wilson and Hilferty
    return statistic / quantile


@pytest.mark.parametrize('name', ['hybrid', 'options'])
def test_of_a_chunk_on_trial_any_number_of_tokens_stays(name):
    """What stays is what running only those tokens leaves, and what comes after is the full pass's."""
    arch = ALL_FAMILIES[name]
    params, tokens = numpy_params(arch), np.random.default_rng(2).integers(0, 64, (3, 20))
    full = np.asarray(jax.jit(Decoder(arch).apply)({'params': params}, tokens))
    run = jax.jit(cached_logits, static_argnames=('arch', 'trial'))
    start = jnp.asarray([9, 3, 0])
    _, cache = run(params, tokens[:, :9], arch, init_cache(arch, 3, 32), start)
    take = lambda begin, count: np.stack([row[at : at + count] for row, at in zip(tokens, np.asarray(begin), strict=True)])
    _, trial = run(params, take(start, 6), arch, cache, jnp.asarray([6, 6, 6]), trial=True)
    kept = jnp.asarray([6, 2, 0])
    settled = jax.jit(settle_cache, static_argnums=0)(arch, trial, kept)
    np.testing.assert_array_equal(settled.length_B, start + kept)
    logits, _ = run(params, take(start + kept, 3), arch, settled, jnp.asarray([3, 3, 3]))
    for row, at in enumerate(np.asarray(start + kept)):
        np.testing.assert_allclose(logits[row], full[row, at : at + 3], atol=1e-5 * np.abs(full).max())


def test_rows_stop_as_without_speculation():
    large, small = random_weights(HYBRID), random_weights(HYBRID, small_of(HYBRID))
    (whole,) = generate(small, LETTERS, ['abc'], 30, PENALTY)
    stop, prompts = [whole.text[4:6]], [*PROMPTS, 'abc']
    expected = generate(small, LETTERS, prompts, 30, PENALTY, stop)
    found, _ = generate_speculative(small, large, LETTERS, prompts, drafts=3, max_tokens=30, sampling=PENALTY, stop=stop)
    assert [(done.text, done.finish) for done in found] == [(done.text, done.finish) for done in expected]
    assert found[3].text == whole.text[:4] and found[3].finish == 'stop'


def test_after_refused_drafts_both_caches_hold_just_the_text():
    """A wrong state of the drafting size would not show in the text, only in what is accepted."""
    arch, rng = HYBRID, np.random.default_rng(8)
    large, small = random_weights(arch), random_weights(arch, small_of(arch))
    prompts = [rng.integers(0, 23, count).tolist() for count in (4, 9)]
    requests = requests_of([Sampling(1.5)] * 2, [1, 2])
    pair = [Decoding(weights, requests, 60, [40, 40]) for weights in (large, small)]
    for decoding in pair:
        decoding.feed(prompts)
    state, first = begin(pair[0].state, pair[1].state.cache)
    held = [[*prompt, int(token)] for prompt, token in zip(prompts, first, strict=True)]
    kept = set()
    for _ in range(2):
        state, rounds = speculate(large, small, state, 3)
        for row, text in enumerate(held):
            for tokens, count in zip(rounds.tokens_BxK[:, row], rounds.count_B[:, row], strict=True):
                text.extend(np.asarray(tokens[:count]).tolist())
        kept |= set(np.asarray(rounds.kept_B).ravel().tolist())
        for weights, cache in ((large, state.large), (small, state.small)):
            lengths = np.asarray(cache.length_B)
            assert all(len(text) - length in (1, 2) for text, length in zip(held, lengths, strict=True))
            rest = np.zeros((2, 2), np.int32)
            for row, text in enumerate(held):
                rest[row, : len(text) - lengths[row]] = text[lengths[row] :]
            count = np.asarray([len(text) for text in held]) - lengths
            logits, _ = jax.jit(cached_logits, static_argnames='arch')(weights.params, rest, weights.arch, cache, count)
            for row, text in enumerate(held):
                full = full_logits(weights, text)[-1]
                np.testing.assert_allclose(logits[row, count[row] - 1], full, atol=1e-5 * np.abs(full).max())
    assert len(kept) > 2  # Rounds that kept none, some, all.


def test_mistakes_are_one_sentence():
    weights = random_weights(HYBRID)
    for drafts, message in ((0, 'drafts=0 must be at least 1'), (65, 'drafts=65 must be at most 64')):
        with pytest.raises(UserError, match=message):
            next(stream_speculative(weights, weights, LETTERS, ['a'], drafts=drafts))
