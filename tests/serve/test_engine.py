"""Continuous batching against each request alone: joining, leaving, thinking, queues, deadlines, and what is compiled."""

import dataclasses
import itertools

import jax
import pytest

from elastic_jax.errors import UserError
from elastic_jax.infer import decoding
from elastic_jax.infer.budget_control import Control, think_then_answer
from elastic_jax.infer.generate import generate
from elastic_jax.infer.handover import FILLS, _hand_over
from elastic_jax.infer.resident import Resident
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.sizes import Sizes
from elastic_jax.serve import lane
from elastic_jax.serve.engine import Engine, Job, Limits, Overloaded
from elastic_jax.serve.server import warm
from tests.infer.tiny import HYBRID, LETTERS, budgets_of, random_weights

BUDGETS = {name: arch for name, arch in budgets_of(HYBRID).items() if name != 'mid'}
SIZES = Sizes(Resident(random_weights(HYBRID).params, HYBRID), BUDGETS, LETTERS)
LIMITS = Limits(slots=2, queue=3, context=120, piece=3)
PROMPTS = ['abcde', 'fghijklmnopqrstuvabcdefghijkl', 'v', 'klm', 'cc']


class Told:
    """A listener that keeps what it was told, and that texts only grow."""

    def __init__(self):
        self.all = []

    def __call__(self, progress):
        if self.all:
            assert progress.text.startswith(self.all[-1].text) and progress.thinking.startswith(self.all[-1].thinking)
            assert not self.all[-1].finish
        self.all.append(progress)

    @property
    def last(self):
        return self.all[-1]


def job(prompt, budget='full', max_tokens=20, **options):
    return Job(tuple(LETTERS.encode(prompt).tolist()), budget, max_tokens, **options)


def run(engine):
    while engine.step():
        pass
    assert engine.outstanding == 0


def test_requests_that_join_and_leave_at_any_time_get_what_each_gets_alone():
    """More than there are slots, of both sizes, greedy and not, arriving while others decode."""
    engine, told = Engine(SIZES, LIMITS), {}
    samplings = [Sampling(), Sampling(1.0), Sampling(1.5, top_k=7, repetition_penalty=1.3), Sampling(), Sampling(0.7, top_p=0.8)]
    for turn in range(5):
        for budget in BUDGETS:
            told[budget, turn] = Told()
            engine.submit(job(PROMPTS[turn], budget, 10 + 7 * turn, sampling=samplings[turn], seed=turn), told[budget, turn])
        engine.step()
    run(engine)
    for (budget, turn), found in told.items():
        weights = SIZES.weights(budget)
        (alone,) = generate(weights, LETTERS, [PROMPTS[turn]], 10 + 7 * turn, samplings[turn], seeds=[turn])
        assert (found.last.text, found.last.tokens, found.last.finish) == (alone.text, len(alone.tokens), alone.finish)


def test_a_stop_string_ends_a_text_and_frees_its_slot():
    (whole,) = generate(SIZES.weights('full'), LETTERS, ['abc'], 30, Sampling(1.0), seeds=[11])
    engine, told = Engine(SIZES, LIMITS), Told()
    engine.submit(job('abc', max_tokens=30, sampling=Sampling(1.0), seed=11, stop=(whole.text[5:8],)), told)
    run(engine)
    assert told.last.text == whole.text[: whole.text.index(whole.text[5:8])] and told.last.finish == 'stop'


@pytest.mark.parametrize('entropy', [None, 3.16, 0.0])
@pytest.mark.parametrize('switch', ['recompute', 'hand-over'])
@pytest.mark.parametrize('pair', [('small', 'full'), ('full', 'small'), ('full', 'full')])
def test_thinking_and_answering_are_those_of_budget_control(pair, switch, entropy):
    control = Control(9, 12, 'uv', 'wq', switch, 'mean', entropy)
    engine, found = Engine(SIZES, LIMITS), [Told() for _ in PROMPTS[:4]]
    for turn, told in enumerate(found):
        request = job(PROMPTS[turn] + 'uv', pair[1], 12, sampling=Sampling(1.0), seed=turn, think=pair[0], control=control)
        engine.submit(request, told)
    run(engine)
    one, other = (SIZES.weights(name) for name in pair)
    thoughts, _ = think_then_answer(one, other, LETTERS, PROMPTS[:4], control, Sampling(1.0), seeds=[0, 1, 2, 3])
    for told, thought in zip(found, thoughts, strict=True):
        assert (told.last.thinking, told.last.text) == (thought.thinking, thought.answer.text)
        drawn = thought.thinking_tokens + thought.continued_tokens
        assert (told.last.thinking_tokens, told.last.finish) == (drawn, thought.answer.finish)


def test_thoughts_that_are_handed_over_end_at_their_delimiter_wherever_it_is_in_a_piece():
    """The thinking size goes on past it in the same piece; cold sampling with a penalty shows a cache that holds too much."""
    cold, small, jobs = Sampling(0.15, repetition_penalty=1.2), SIZES.weights('small'), []
    for prompt in ('v', 'klm', 'abcdef'):
        (free,) = generate(small, LETTERS, [prompt + 'uv'], 12, cold, seeds=[2])
        jobs += [(prompt, Control(12, 12, 'uv', free.text[at : at + 2], 'hand-over')) for at in range(2, 7)]
    engine, found = Engine(SIZES, dataclasses.replace(LIMITS, queue=len(jobs))), [Told() for _ in jobs]
    for (prompt, control), told in zip(jobs, found, strict=True):
        engine.submit(job(prompt + 'uv', 'small', 12, sampling=cold, seed=2, think='small', control=control), told)
    run(engine)
    for (prompt, control), told in zip(jobs, found, strict=True):
        (thought,), _ = think_then_answer(small, small, LETTERS, [prompt], control, cold, seeds=[2])
        assert (told.last.thinking, told.last.text) == (thought.thinking, thought.answer.text)


def test_caches_that_wait_for_a_slot_are_no_more_than_slots():
    """The answering size is busy when all have thought."""
    engine, busy, found = Engine(SIZES, dataclasses.replace(LIMITS, slots=1, queue=8)), Told(), [Told() for _ in range(5)]
    engine.submit(job('abc', max_tokens=60, sampling=Sampling(1.0), seed=11), busy)
    control, waited = Control(4, 6, 'uv', 'wq', 'hand-over'), 0
    for seed, told in enumerate(found):
        engine.submit(job('klmuv', max_tokens=6, sampling=Sampling(1.0), seed=seed, think='small', control=control), told)
    while engine.step():
        waiting = sum(request.given is not None for request in engine._queues['full'])
        waited = max(waited, waiting)
    assert waited == 1 and all(told.last.finish for told in (busy, *found))
    pair = SIZES.weights('small'), SIZES.weights('full')
    thoughts, _ = think_then_answer(*pair, LETTERS, ['klm'] * 5, control, Sampling(1.0), seeds=range(5))
    assert [told.last.text for told in found] == [thought.answer.text for thought in thoughts]


def test_a_full_queue_turns_away_and_takes_on_again_when_there_is_room():
    engine = Engine(SIZES, LIMITS)
    for _ in range(LIMITS.slots + LIMITS.queue):
        engine.submit(job('abc'), Told())
    with pytest.raises(Overloaded, match='full: 5 requests are running or waiting'):
        engine.submit(job('abc'), Told())
    other, late = Told(), Told()
    engine.submit(job('abc', 'small'), other)  # Another size has a queue of its own.
    run(engine)
    engine.submit(job('abc'), late)
    run(engine)
    assert other.last.finish and late.last.finish


def test_cancelled_and_late_requests_free_their_slots():
    now = [0.0]
    engine = Engine(SIZES, LIMITS, clock=lambda: now[0])
    told = [Told() for _ in range(4)]
    texts = [generate(SIZES.weights('full'), LETTERS, ['abc'], 30, Sampling(1.0), seeds=[seed])[0] for seed in range(30)]
    seeds = [seed for seed, text in enumerate(texts) if len(text.tokens) > 20][:4]
    requests = [
        engine.submit(job('abc', max_tokens=30, sampling=Sampling(1.0), seed=seed), each)
        for seed, each in zip(seeds, told, strict=True)
    ]
    engine.step()
    assert engine.report()['running'] == {'full': 2, 'small': 0}
    engine.cancel(requests[0])
    engine.cancel(requests[3])  # still in the queue
    engine.step()
    assert told[0].last.finish == told[3].last.finish == 'cancelled'
    assert engine.outstanding == 2 and engine.report()['running']['full'] == 2  # the third has the first's slot
    now[0] = LIMITS.seconds + 1
    engine.step()
    assert told[1].last.finish == told[2].last.finish == 'timeout' and engine.outstanding == 0
    assert engine.report()['running'] == {'full': 0, 'small': 0}


def test_a_failure_ends_what_was_there_and_the_next_request_runs():
    engine, told, late = Engine(SIZES, LIMITS), [Told() for _ in range(4)], Told()
    for each in told:
        engine.submit(job('abc', max_tokens=60), each)
    engine.step()
    engine.fail()
    assert [each.last.finish for each in told] == ['failed'] * 4 and engine.outstanding == 0
    engine.submit(job('abcde', max_tokens=9), late)
    run(engine)
    assert late.last.text == generate(SIZES.weights('full'), LETTERS, ['abcde'], 9)[0].text


def test_other_requests_compile_nothing_new():
    engine = Engine(SIZES, LIMITS)
    programs = (decoding.advance, decoding.feed_chunk, lane._join, decoding._empty_state)
    for budget in BUDGETS:
        for length in (1, 20, 90):
            engine.submit(job('a' * length, budget, 4), Told())
    run(engine)
    counts = [program._cache_size() for program in programs]
    for budget in BUDGETS:
        for length in (3, 17, 70):
            engine.submit(job('b' * length, budget, 9, sampling=Sampling(0.9, 5, 0.5, 1.1), seed=3, stop=('ab',)), Told())
            engine.step()
    run(engine)
    assert [program._cache_size() for program in programs] == counts


def test_slices_of_a_server_keep_to_their_limit_and_requests_cut_none_anew():
    """Either of two slices fits, both do not: one of the sizes runs without."""
    archs = {**budgets_of(HYBRID), 'other': HYBRID.narrow(embed=13)}
    whole = Resident(random_weights(HYBRID).params, HYBRID)
    limit = max(whole.slice_bytes(arch) for arch in archs.values())
    resident = Resident(whole.params, HYBRID, limit_bytes=limit)
    engine, told = Engine(Sizes(resident, archs, LETTERS), LIMITS), {name: Told() for name in archs}
    for name in archs:
        engine.submit(job('abc', name, 5), told[name])
    run(engine)
    own = {id(leaf): leaf.nbytes for weights in engine._weights.values() for leaf in jax.tree.leaves(weights.params)}
    resident_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(whole.params))
    assert 0 < resident.report()['slices_bytes'] == sum(own.values()) - resident_bytes <= limit
    assert resident.evictions == 0
    for name, arch in archs.items():
        assert told[name].last.text == generate(random_weights(HYBRID, arch), LETTERS, ['abc'], 5)[0].text


def test_a_server_of_one_slot_and_a_queue_of_one_compiles_all_it_needs():
    engine = Engine(SIZES, Limits(slots=1, queue=1, context=64))
    warm(engine)
    assert engine.outstanding == 0
    programs = (decoding.advance, decoding.feed_chunk, decoding.move_mark, lane._join, lane._join_mark, lane._row, _hand_over)
    counts = [program._cache_size() for program in programs]
    for think, answer, fill in itertools.product(BUDGETS, BUDGETS, FILLS):
        control = Control(20, 4, 'uv', 'wq', 'hand-over', fill)
        engine.submit(job('abcuv', answer, 4, sampling=Sampling(1.0), think=think, control=control), Told())
        run(engine)
    assert [program._cache_size() for program in programs] == counts


def test_a_context_has_room_for_a_prompt_and_a_token():
    with pytest.raises(UserError, match='context=1 must be at least 2'):
        Limits(context=1)


def test_memory_is_reported():
    memory = Engine(SIZES, LIMITS).report()['memory']
    assert memory['caches_bytes'] > 0 and memory['resident_bytes'] > memory['slices_bytes'] > 0


@pytest.mark.parametrize(
    ('asked', 'message'),
    [
        (job('a', 'full', 200), 'make 201 tokens, but a request may have 120'),
        (job(''), 'the prompt is empty'),
        (job('a', 'smal'), "unknown budget 'smal'; did you mean 'small'"),
        (job('a', think='small', control=Control(110, 4, closing='wq')), 'lower max_tokens or thinking_tokens'),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(asked, message):
    with pytest.raises(UserError, match=message):
        Engine(SIZES, LIMITS).submit(asked, Told())
