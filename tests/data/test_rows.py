"""Rows found by arithmetic are those of plain loops over the documents, however rows are made of them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax.data.packing import best_fit, pack_pieces
from elastic_jax.data.rows import ConcatRows, PackedRows, assemble
from tests.data.plain import assert_rows, concat_rows, make_row, make_store

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=8)
SCORED = st.one_of(st.none(), st.lists(st.booleans(), min_size=1, max_size=7))


@given(LENGTHS, SCORED, st.integers(1, 24), st.integers(0, 5), st.sets(st.integers(0, 30), min_size=1))
def test_any_rows_of_the_concatenation_are_those_of_a_plain_loop(lengths, scored, context, seed, asked):
    store = make_store(lengths, scored)
    expected = concat_rows(store, context, seed, max(asked) + 1)
    rows = sorted(asked)
    found = assemble(store, ConcatRows(store, context, seed).pieces(np.asarray(rows)), len(rows), context)
    assert_rows(found, [expected[r] for r in rows])


def test_an_epoch_holds_every_document_once_and_epochs_differ_in_order():
    store = make_store([3, 5, 7, 2, 9, 4])
    total = len(store.tokens)
    rows = ConcatRows(store, total, 0)
    first, second = (assemble(store, rows.pieces(np.asarray([r])), 1, total)['tokens'][0] for r in (0, 1))
    np.testing.assert_array_equal(np.sort(first), np.sort(store.tokens))
    np.testing.assert_array_equal(np.sort(second), np.sort(store.tokens))
    assert (first != second).any()


@given(LENGTHS, SCORED, st.integers(1, 24), st.integers(0, 5))
def test_whole_documents_stand_in_rows_once_an_epoch_with_every_target_once(lengths, scored, context, seed):
    store = make_store(lengths, scored)
    rows = PackedRows(store, context, seed)
    for epoch in range(2):
        numbers = np.arange(epoch * rows.per_epoch, (epoch + 1) * rows.per_epoch)
        pieces = rows.pieces(numbers)
        batch = assemble(store, pieces, len(numbers), context)
        # Every piece is a stretch of one document, cut only where a document is longer than a row.
        expected = [[] for _ in numbers]
        for i, (row, start, length) in enumerate(zip(pieces.row, pieces.start, pieces.length, strict=True)):
            document = int(np.searchsorted(store.starts, start, side='right')) - 1
            within = start - store.starts[document]
            assert within % context == 0 and length == min(context, store.starts[document + 1] - start)
            expected[row] += [(i, index) for index in range(start, start + length)]
        assert_rows(batch, [make_row(store, places, context) for places in expected])
        covered = np.concatenate([np.arange(s, s + n) for s, n in zip(pieces.start, pieces.length, strict=True)])
        np.testing.assert_array_equal(np.sort(covered), np.arange(len(store.tokens)))
        assert (batch['segment_ids'] > 0).sum() == len(store.tokens)


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Room left of every row, by looking at all rows for each piece."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in range(len(left)) if left[r] >= length]
        if fitting:
            left[min(fitting, key=lambda r: left[r])] -= length
        else:
            left.append(capacity - length)
    return sorted(left)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_best_fit_is_that_of_a_plain_search(lengths):
    row = best_fit(np.asarray(lengths), 30)
    used = np.bincount(row, lengths)
    assert used.max() <= 30
    assert sorted(30 - used) == plain_best_fit(lengths, 30)


def test_rows_of_many_documents_are_nearly_full():
    lengths = np.random.default_rng(0).lognormal(5.5, 1, 20_000).astype(int) + 1
    packed = pack_pieces(np.concatenate([[0], np.cumsum(lengths)]), 2048)
    assert lengths.sum() / ((len(packed.row_starts) - 1) * 2048) > 0.99
