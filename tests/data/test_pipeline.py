"""Batches are what a plain loop over the documents gives, in one order that no process count and no interruption changes."""

import itertools

import numpy as np
import pytest

from elastic_jax.data.pipeline import default_data_config, heldout_batches, load_stores, make_iterator
from elastic_jax.data.store import TokenStore
from elastic_jax.errors import UserError


def load_store(config, split: str) -> TokenStore:
    """The one source's tokens."""
    (store,) = load_stores(config, split).values()
    return store


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
