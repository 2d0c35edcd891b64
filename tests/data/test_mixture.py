"""Mixtures keep their shares without end, in one order, and cost no state."""

import collections
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax.data import pipeline
from elastic_jax.data.mixture import LONGEST_PERIOD, Mixture, period_counts
from elastic_jax.data.pipeline import Batches, BatchIterator
from elastic_jax.data.rows import ConcatRows
from elastic_jax.data.stream import Stream
from tests.data.plain import assert_rows, concat_rows, make_store

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any)


@given(COUNTS)
def test_sources_take_turns_in_their_shares_and_none_skips_a_row(counts):
    mixture = Mixture(counts)
    source, row = mixture.locate(np.arange(5 * mixture.period))
    seen = collections.Counter()
    for r, (s, own) in enumerate(zip(source.tolist(), row.tolist(), strict=True), start=1):
        assert own == seen[s]  # the next row of its source: none twice, none left out
        seen[s] += 1
        for s, count in enumerate(counts):
            assert abs(seen[s] - r * count / sum(counts)) <= (len(counts) + 1) / 2
    assert [seen[s] for s in range(len(counts))] == [5 * count for count in counts]


@pytest.mark.parametrize(
    ('weights', 'expected'),
    [
        ([70, 30], [7, 3]),
        ([0.7, 0.3], [7, 3]),
        ([1], [1]),
        ([0.5, 0.3, 0.2], [5, 3, 2]),
        ([1, 0, 2], [1, 0, 2]),
        ([1 / 3, 1], None),
    ],
)
def test_a_period_holds_the_shares_as_written(weights, expected):
    counts = period_counts(weights)
    assert expected is None or counts == expected
    assert sum(counts) <= LONGEST_PERIOD
    for count, weight in zip(counts, weights, strict=True):
        assert abs(Fraction(count, sum(counts)) - Fraction(weight) / Fraction(sum(weights))) < 2e-5


@pytest.mark.parametrize('weights', [[1_000_000, 10], [0.99, 0.01 / 7], [123_456_789, 98_765, 4_321]])
def test_a_small_source_has_its_share_and_no_multiple_of_it(weights):
    counts = period_counts(weights)
    assert sum(counts) <= LONGEST_PERIOD
    for count, weight in zip(counts, weights, strict=True):
        assert count / sum(counts) == pytest.approx(weight / sum(weights), rel=0.02)


def test_the_smallest_source_is_not_lost():
    assert period_counts([1e-9, 1.0, 1 / 7])[0] == 1


@pytest.mark.parametrize('start', [0, 1, 2, 3, 7])
def test_batches_made_in_blocks_are_those_made_one_by_one(monkeypatch, start):
    monkeypatch.setattr(pipeline, 'BLOCK_TOKENS', 100)
    stores = [make_store([5, 9, 30, 2], name=i) for i in range(2)]
    stream = Stream({f's{i}': ConcatRows(store, 8, 0) for i, store in enumerate(stores)}, [2, 1], 8, 0)
    batches = Batches(stream, 5, [(1, 3), (4, 5)])
    assert batches.per_block == 4
    iterator = BatchIterator(batches, start)
    for k in range(start, start + 10):
        found, expected = next(iterator), batches[k]
        assert iterator.get_state()['next_batch'] == k + 1
        for key in expected:
            np.testing.assert_array_equal(found[key], expected[key])


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 5)), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 20),
    st.data(),
)
def test_batches_of_a_mixture_are_those_of_a_plain_loop_for_any_split_over_processes(sources, context, batch_size, k, data):
    counts = [count for _, count in sources]
    stores = {f's{i}': make_store(lengths, name=i) for i, (lengths, _) in enumerate(sources)}
    stream = Stream({name: ConcatRows(store, context, 3) for name, store in stores.items()}, counts, context, 3)
    # The plain loop: the source furthest behind its share gives the next row.
    total = (k + 1) * batch_size
    plain = {name: concat_rows(store, context, 3, total) for name, store in stores.items()}
    taken, rows = [0] * len(counts), []
    while len(rows) < total:
        next_of = [Fraction(2 * taken[s] + 1, 2 * counts[s]) for s in range(len(counts))]
        s = next_of.index(min(next_of))
        rows.append(plain[f's{s}'][taken[s]])
        taken[s] += 1
    expected = rows[k * batch_size :]
    assert_rows(Batches(stream, batch_size)[k], expected)
    # Processes hold ranges of rows, in any pattern.
    owner = data.draw(st.lists(st.integers(0, 3), min_size=batch_size, max_size=batch_size))
    for process in set(owner):
        held = [i for i in range(batch_size) if owner[i] == process]
        assert_rows(Batches(stream, batch_size, [(i, i + 1) for i in held])[k], [expected[i] for i in held])
