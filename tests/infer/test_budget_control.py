"""One size thinks, another answers: against the same done by hand with each size alone."""

import dataclasses

import numpy as np
import pytest

from elastic_jax.data.tokenizers import load_tokenizer
from elastic_jax.errors import UserError
from elastic_jax.infer.budget_control import Control, agreement, closing_of, shown_thoughts, think_then_answer, thoughts_of
from elastic_jax.infer.generate import generate
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.text import Completion
from tests.data.bpe import write_byte_fallback
from tests.infer.tiny import HYBRID, LETTERS, budgets_of, ending_at, full_logits, random_weights

BUDGETS = budgets_of(HYBRID)
SIZES = {name: random_weights(HYBRID, BUDGETS[name]) for name in ('small', 'full')}
WARM = Sampling(1.0)
PROMPTS = ['abcde', 'fghijklmnopqrstu', 'v']
OPENING, CLOSING = 'uv', 'wq'


def control(switch='recompute', closing=CLOSING, **options):
    return Control(20, 12, OPENING, closing, switch, **options)


def think(one, other, settings, prompts=PROMPTS, sampling=WARM, seeds=(1, 2, 3)):
    return think_then_answer(SIZES[one], SIZES[other], LETTERS, prompts, settings, sampling, seeds=seeds[: len(prompts)])


@pytest.mark.parametrize('switch', ['recompute', 'hand-over'])
def test_with_one_size_for_both_a_switch_of_either_kind_does_not_show(switch):
    """Rows close their thoughts in different ways and places: by themselves within a piece, and at the limit."""
    free = generate(SIZES['small'], LETTERS, [prompt + OPENING for prompt in PROMPTS], 20)
    closing = free[0].text[3:5]
    thoughts, timing = think('small', 'small', control(switch, closing), sampling=Sampling())
    for prompt, whole, thought in zip(PROMPTS, free, thoughts, strict=True):
        assert thought.thinking == whole.text.partition(closing)[0]
        (answer,) = generate(SIZES['small'], LETTERS, [f'{prompt}{OPENING}{thought.thinking}{closing}'], 12)
        assert thought.answer == answer
    assert [thought.thinking_tokens for thought in thoughts] == [5, 7, 20]
    assert timing.thinking > 0 and 0 < timing.switch < timing.to_answer


@pytest.mark.parametrize(('one', 'other'), [('small', 'full'), ('full', 'small')])
def test_recomputed_answers_are_those_of_the_answering_size_alone(one, other):
    thoughts, _ = think(one, other, control(), sampling=Sampling(repetition_penalty=1.2))
    for prompt, thought in zip(PROMPTS, thoughts, strict=True):
        (alone,) = generate(SIZES[one], LETTERS, [prompt + OPENING], 20, Sampling(repetition_penalty=1.2), stop=[CLOSING])
        assert thought.thinking == alone.text
        begun = f'{prompt}{OPENING}{alone.text}{CLOSING}'
        (answer,) = generate(SIZES[other], LETTERS, [begun], 12, Sampling(repetition_penalty=1.2))
        assert thought.answer == answer


def test_a_batch_thinks_as_each_alone():
    together, _ = think('small', 'full', control('hand-over'))
    for row, prompt in enumerate(PROMPTS):
        (alone,), _ = think('small', 'full', control('hand-over'), [prompt], seeds=(row + 1,))
        assert together[row] == alone


def test_any_of_several_tokens_ends_thoughts_and_answers():
    (free,), _ = think('small', 'full', control(), ['abcde'], seeds=(2,))
    two = ending_at(23, *LETTERS.encode(free.thinking[6]).tolist())
    (ended,), _ = think_then_answer(SIZES['small'], SIZES['full'], two, ['abcde'], control(), WARM, seeds=[2])
    assert ended.thinking == free.thinking.partition(free.thinking[6])[0]
    assert not set(ended.answer.tokens) & set(two.stop_ids)


@pytest.mark.parametrize('switch', ['recompute', 'hand-over'])
def test_thoughts_end_at_their_delimiter_though_the_text_ends_in_the_same_piece(switch):
    """All within one piece: the delimiter, an answer of the thinking size's own, and the end of the text."""
    (free,) = generate(SIZES['small'], LETTERS, ['abcde' + OPENING], 16, WARM, seeds=[2])
    new = [i for i, letter in enumerate(free.text) if letter not in free.text[:i]]
    start, end = new[3], new[6]
    ending = ending_at(23, *LETTERS.encode(free.text[end]).tolist())
    settings = control(switch, closing=free.text[start])
    (thought,), _ = think_then_answer(SIZES['small'], SIZES['small'], ending, ['abcde'], settings, WARM, seeds=[2])
    assert thought.thinking == free.text[:start]
    assert thought.answer.text == free.text[start + 1 : end] and thought.answer.finish == 'stop'


@pytest.mark.parametrize('switch', ['recompute', 'hand-over'])
def test_a_delimiter_that_text_does_not_show_ends_thoughts_too(switch):
    """As a special token, which decoding leaves out."""
    (free,) = generate(SIZES['small'], LETTERS, ['abcde' + OPENING], 16, WARM, seeds=[2])
    letter = next(letter for i, letter in enumerate(free.text) if i > 2 and letter not in free.text[:i])
    hiding = ending_at(*LETTERS.stop_ids)
    hiding.decode = lambda ids: LETTERS.decode(ids).replace(letter, '')
    expected, found = (
        think_then_answer(SIZES['small'], SIZES['full'], tokenizer, ['abcde'], control(switch, letter), WARM, seeds=[2])[0][0]
        for tokenizer in (LETTERS, hiding)
    )
    assert found.thinking == expected.thinking == free.text.partition(letter)[0]
    assert found.answer.tokens == expected.answer.tokens


def test_both_switches_draw_alike_where_the_sizes_are_one():
    recomputed, handed = (think('small', 'small', control(switch))[0] for switch in ('recompute', 'hand-over'))
    assert recomputed == handed and agreement(recomputed, handed) == 1.0
    other = [dataclasses.replace(thought, answer=Completion('', [99] * 12, 'length')) for thought in handed]
    assert agreement(recomputed, other) == 0.0


@pytest.mark.parametrize('switch', ['recompute', 'hand-over'])
def test_above_an_entropy_the_answering_size_takes_over_the_thinking(switch):
    """The place of the switch by hand: the first token whose distribution, in a full pass, is flatter than the threshold."""
    entropies = {}
    for prompt in PROMPTS:
        tokens = [*LETTERS.encode(prompt + OPENING)]
        for count, token in enumerate([*generate(SIZES['small'], LETTERS, [prompt + OPENING], 20)[0].tokens, None]):
            entropies[prompt, count] = nats(full_logits(SIZES['small'], tokens)[-1])
            tokens.append(token)
    threshold = sorted(entropies.values())[-8] + 1e-4
    thoughts, _ = think('small', 'small', control(switch, entropy=threshold), sampling=Sampling())
    switched = 0
    for prompt, thought in zip(PROMPTS, thoughts, strict=True):
        limit = thought.thinking_tokens + thought.continued_tokens
        expected = next((n for n in range(limit) if entropies[prompt, n] > threshold), limit)
        assert thought.thinking_tokens == expected
        switched += expected < limit
        (alone,) = generate(SIZES['small'], LETTERS, [prompt + OPENING], 20, stop=[CLOSING])
        assert thought.thinking == alone.text  # One size for both: who thinks must not show.
        (answer,) = generate(SIZES['small'], LETTERS, [f'{prompt}{OPENING}{alone.text}{CLOSING}'], 12)
        assert thought.answer == answer
    assert switched


def test_at_an_entropy_of_zero_the_answering_size_thinks_everything():
    thoughts, _ = think('small', 'full', control(entropy=0.0), sampling=Sampling())
    for prompt, thought in zip(PROMPTS, thoughts, strict=True):
        assert thought.thinking_tokens == 0 < thought.continued_tokens
        assert thought.thinking == generate(SIZES['full'], LETTERS, [prompt + OPENING], 20, stop=[CLOSING])[0].text


@pytest.mark.parametrize(('text', 'limit'), [(' cd</think>', 99), (' cd', 3)], ids=['closed by itself', 'closed by the limit'])
def test_thoughts_keep_their_spaces_and_a_delimiter_brings_none(tmp_path, text, limit):
    """With a tokenizer that begins every text with a space."""
    tokenizer = load_tokenizer(str(write_byte_fallback(tmp_path)))
    begun, closing = tokenizer.encode('ab<think>').tolist(), closing_of('</think>', tokenizer)
    drawn = tokenizer.encode('ab<think>' + text).tolist()[len(begun) :]
    thoughts = thoughts_of(begun, drawn, tokenizer, limit, closing)
    assert thoughts.closed and shown_thoughts(begun, thoughts, tokenizer, closing) == ' cd'
    assert tokenizer.decode([*begun, *thoughts.tokens]) == 'ab<think> cd</think>'


def nats(logits):
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return float(-(p * np.log(p)).sum())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'thinking_tokens': 0}, 'thinking_tokens=0 must be at least 1'),
        ({'thinking_tokens': 2**31}, 'thinking_tokens=2147483648 must be at most 268435456'),
        ({'switch': 'swap'}, "switch='swap' is unknown; give one of recompute, hand-over"),
        ({'fill': 'ones'}, "fill='ones' is unknown"),
        ({'closing': ''}, 'the closing delimiter is empty'),
        ({'entropy': -1.0}, 'entropy=-1.0 must be at least 0'),
    ],
)
def test_mistakes_are_one_sentence(options, message):
    with pytest.raises(UserError, match=message):
        Control(**options)
