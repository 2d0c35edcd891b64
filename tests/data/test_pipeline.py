"""Batches are what a plain loop over the documents gives, in one order that no process count and no interruption changes."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax.data.pipeline import PackedBatches, TokenStore, default_data_config, heldout_batches, load_store, make_iterator
from elastic_jax.errors import UserError

EOS = 256


def make_store(lengths: list[int]) -> TokenStore:
    """Documents of distinct tokens: token value tells document and place."""
    documents = [np.append(np.arange(n) + 1000 * i, EOS) for i, n in enumerate(lengths)]
    starts = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
    return TokenStore(np.concatenate(documents).astype(np.int32), starts, np.ones(10**6, np.float32), 'test')


def plain_rows(store: TokenStore, context: int, seed: int, count: int) -> list[dict]:
    """The first rows of the stream, token by token."""
    stream: list[tuple[int, tuple[int, int]]] = []
    epoch = 0
    while len(stream) < count * context + 1:
        for document in np.random.default_rng([seed, epoch]).permutation(store.documents):
            tokens = store.tokens[store.starts[document] : store.starts[document + 1]]
            stream += [(int(token), (epoch, int(document))) for token in tokens]
        epoch += 1
    rows = []
    for r in range(count):
        own, following = stream[r * context : (r + 1) * context], stream[r * context + 1 : (r + 1) * context + 1]
        segment, position, segments, positions = 0, 0, [], []
        for i, (_, name) in enumerate(own):
            fresh = i == 0 or name != own[i - 1][1]
            segment, position = (segment + 1, 0) if fresh else (segment, position + 1)
            segments.append(segment)
            positions.append(position)
        same = [a[1] == b[1] for a, b in zip(own, following, strict=True)]
        rows.append(
            {
                'tokens': [token for token, _ in own],
                'targets': [token if ok else 0 for (token, _), ok in zip(following, same, strict=True)],
                'segment_ids': segments,
                'positions': positions,
                'loss_mask': [float(ok) for ok in same],
            }
        )
    return rows


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    context=st.integers(1, 24),
    batch_size=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_rows_are_those_of_a_plain_loop_over_epochs(lengths, context, batch_size, seed):
    store = make_store(lengths)
    source = PackedBatches(store, batch_size, context, seed)
    expected = plain_rows(store, context, seed, 3 * batch_size)
    for k in range(3):
        batch = source[k]
        for key in expected[0]:
            rows = [row[key] for row in expected[k * batch_size : (k + 1) * batch_size]]
            np.testing.assert_array_equal(batch[key], rows, err_msg=key)


def test_an_epoch_holds_every_document_once_and_epochs_differ_in_order():
    store = make_store([3, 5, 7, 2, 9, 4])
    total = len(store.tokens)
    source = PackedBatches(store, 1, total, 0)
    first, second = source[0]['tokens'][0], source[1]['tokens'][0]
    np.testing.assert_array_equal(np.sort(first), np.sort(store.tokens))
    np.testing.assert_array_equal(np.sort(second), np.sort(store.tokens))
    assert (first != second).any()


# Of two processes, of four, and of two whose devices alternate in the mesh.
@pytest.mark.parametrize(
    'shares',
    [[[(0, 4)], [(4, 8)]], [[(i, i + 2)] for i in (0, 2, 4, 6)], [[(0, 2), (4, 6)], [(2, 4), (6, 8)]]],
    ids=['halves', 'quarters', 'interleaved'],
)
def test_processes_share_one_global_order(shares):
    config = default_data_config()
    whole = make_iterator(config, split='train', batch_size=8, context=64, seed=3)
    iterators = [make_iterator(config, split='train', batch_size=8, context=64, seed=3, rows=rows) for rows in shares]
    for _ in range(4):
        expected = next(whole)
        for rows, part in zip(shares, map(next, iterators), strict=True):
            for key in expected:
                own = np.concatenate([expected[key][first:last] for first, last in rows])
                np.testing.assert_array_equal(own, part[key], err_msg=key)


def test_a_saved_position_goes_on_exactly_also_with_another_process_count():
    config = default_data_config()
    make = lambda **kwargs: make_iterator(config, split='train', batch_size=4, context=32, seed=1, **kwargs)
    undisturbed = [next(it) for it in [make()] for _ in range(9)]
    interrupted = make()
    for _ in range(5):
        next(interrupted)
    state = interrupted.get_state()  # of the last batch handed out, whatever was read ahead
    resumed = make()
    resumed.set_state(state)
    halves = [make(rows=[rows]) for rows in ((0, 2), (2, 4))]
    for half in halves:
        half.set_state(state)
    for expected in undisturbed[5:]:
        np.testing.assert_array_equal(next(resumed)['tokens'], expected['tokens'])
        np.testing.assert_array_equal(np.concatenate([next(half)['tokens'] for half in halves]), expected['tokens'])


def test_a_position_of_other_data_is_refused_by_name():
    config = default_data_config()
    state = make_iterator(config, split='train', batch_size=4, context=32, seed=1).get_state()
    with pytest.raises(UserError, match='context: 32 saved, 64 now'):
        make_iterator(config, split='train', batch_size=4, context=64, seed=1).set_state(state)
    config.heldout_fraction = 0.2
    with pytest.raises(UserError, match='fingerprint'):
        make_iterator(config, split='train', batch_size=4, context=32, seed=1).set_state(state)


def test_held_out_batches_score_every_token_once():
    config = default_data_config()
    store = load_store(config, 'heldout')
    batches = list(heldout_batches(config, 8, 256))
    scored = sum(float(batch['loss_mask'].sum()) for batch in batches)
    assert scored == len(store.tokens) - store.documents  # all but the first token of each document
    # A target stands for its bytes: all the text but each document's first byte, and nothing for the end-of-text token.
    assert sum(float(batch['target_bytes'].sum()) for batch in batches) == len(store.tokens) - 2 * store.documents
    assert len(list(heldout_batches(config, 8, 256, 3))) == 3
    again = next(heldout_batches(config, 8, 256))
    np.testing.assert_array_equal(again['tokens'], batches[0]['tokens'])


def test_train_and_held_out_share_no_line_block_and_no_document():
    config = default_data_config()
    stores = {split: load_store(config, split) for split in ('train', 'heldout')}
    texts = {split: {store.tokens[a:b].tobytes() for a, b in itertools.pairwise(store.starts)} for split, store in stores.items()}
    assert not texts['train'] & texts['heldout']
    share = len(stores['heldout'].tokens) / (len(stores['train'].tokens) + len(stores['heldout'].tokens))
    assert 0.01 < share < 0.12


def test_text_files_are_found_by_folder_and_pattern(tmp_path):
    for i in range(40):
        (tmp_path / f'{i}.txt').write_text(f'document {i}')
    config = default_data_config()
    config.heldout_fraction = 0.3
    for path in (tmp_path, tmp_path / '*.txt'):
        config.path = str(path)
        documents = load_store(config, 'train').documents + load_store(config, 'heldout').documents
        assert documents == 40
    config.path = str(tmp_path / '1*.txt')
    assert load_store(config, 'train').documents + load_store(config, 'heldout').documents == 11
