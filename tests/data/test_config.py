"""The keys of config.data: sources, shares and stages, and the sentence for what does not fit."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from elastic_jax.data.config import default_data_config, sources_of, stage_data
from elastic_jax.data.pipeline import heldout_batches, load_stores, make_iterator, read_all
from elastic_jax.errors import UserError
from elastic_jax.train.config import stage


@pytest.fixture
def config(tmp_path):
    """Three sources, each of a letter of its own."""
    for letter, count in (('a', 300), ('b', 60), ('c', 30)):
        digits = str.maketrans('01', letter + letter.upper())
        lines = [json.dumps({'text': f'{i:0{10 + i % 7}b}'.translate(digits)}) for i in range(count)]
        (tmp_path / f'{letter}.jsonl').write_text('\n'.join(lines))
    config = default_data_config()
    config.sources = ConfigDict({letter: {'path': str(tmp_path / f'{letter}.jsonl')} for letter in 'abc'}, convert_dict=False)
    config.heldout_fraction = 0.2
    return config


def shares(config, batches=20, **kwargs):
    """Rows of each letter in the first batches of ten."""
    iterator = make_iterator(config, split='train', batch_size=10, context=16, seed=0, **kwargs)
    counts = np.zeros(3, int)
    for _ in range(batches):
        tokens = next(iterator)['tokens']
        counts += [(np.isin(tokens, [ord(letter), ord(letter.upper())]).any(1)).sum() for letter in 'abc']
    return counts.tolist()


def test_weights_are_shares_of_the_rows_in_any_unit_and_never_run_out(config):
    for weights in ({'a': 70, 'b': 30}, {'b': 0.3, 'a': 0.7}, {'a': 7, 'c': 0, 'b': 3}):
        config.weights = ConfigDict(weights)
        assert shares(config) == [140, 60, 0]
    config.weights = ConfigDict({'c': 1})
    assert shares(config) == [0, 0, 200]  # about eleven epochs


def test_without_weights_sources_share_by_size_and_an_epoch_holds_all(config):
    stores = load_stores(config, 'train')
    rows = np.asarray([-(-len(store.tokens) // 16) for store in stores.values()])
    batches = int(rows.sum()) // 10
    assert np.abs(shares(config, batches) - rows * (10 * batches / rows.sum())).max() <= 2


def test_settings_are_shared_unless_a_source_has_its_own(config):
    config.update({'field': 'text', 'max_bad_lines': 3})
    config.sources['b'] = {'path': config.sources['b']['path'], 'max_bad_lines': 9, 'encoding': 'latin-1'}
    found = {source.name: source for source, _ in sources_of(config)}
    assert [found[name].max_bad_lines for name in 'abc'] == [3, 9, 3]
    assert [found[name].encoding for name in 'abc'] == ['utf-8', 'latin-1', 'utf-8']


def test_a_mixture_goes_on_exactly_where_it_was_and_only_there(config):
    config.weights = ConfigDict({'a': 5, 'b': 3, 'c': 2})
    for packing in ('concat', 'whole'):
        config.packing = packing
        make = lambda **kwargs: make_iterator(config, split='train', batch_size=4, context=24, seed=1, **kwargs)
        undisturbed = [next(it) for it in [make()] for _ in range(9)]
        interrupted = make()
        for _ in range(5):
            next(interrupted)
        state = json.loads(json.dumps(interrupted.get_state()))
        halves = [make(rows=[rows]) for rows in ((0, 3), (3, 4))]
        for half in halves:
            half.set_state(state)
        for expected in undisturbed[5:]:
            parts = [next(half) for half in halves]
            for key in expected:
                np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), expected[key])
        for changes in ({'weights': {'a': 5, 'b': 2, 'c': 3}}, {'packing': {'concat': 'whole', 'whole': 'concat'}[packing]}):
            other = make_iterator(stage_data(config, changes), split='train', batch_size=4, context=24, seed=1)
            with pytest.raises(UserError, match='fingerprint'):
                other.set_state(state)


@pytest.mark.parametrize('packing', ['concat', 'whole'])
def test_held_out_batches_score_every_source_once_and_mix_them(config, packing):
    config.packing = packing
    batches = list(heldout_batches(config, 4, 24))
    stores = load_stores(config, 'heldout')
    scored = sum(int(batch['loss_mask'].sum()) for batch in batches)
    assert scored == sum(len(store.tokens) - store.documents for store in stores.values())
    assert sum(float(batch['target_bytes'].sum()) for batch in batches) == scored - sum(s.documents for s in stores.values())
    assert {batch['tokens'].shape for batch in batches} == {(4, 24)}
    early = np.concatenate([batch['tokens'] for batch in batches[: len(batches) // 2]])
    assert all((early == ord(letter)).any() for letter in 'abc')


def test_a_source_may_hold_nothing_out_but_not_all_of_them(config):
    config.heldout_fraction = 0.0
    with pytest.raises(UserError, match='heldout split of source a has no documents'):
        read_all([config])
    config.sources['b'] = {**config.sources['b'], 'heldout_fraction': 0.5}
    assert read_all([config]) == [] and list(load_stores(config, 'heldout')) == ['b']
    config.sources['c'] = {**config.sources['c'], 'heldout_fraction': 1.0}
    with pytest.raises(UserError, match='train split of source c has no documents'):
        read_all([config])


def test_a_stage_has_data_of_its_own(config):
    changed = stage('elastic', 5, 16, 10, data={'weights': {'c': 1}, 'packing': 'whole'})
    assert shares(stage_data(config, changed.data)) == [0, 0, 200]
    assert stage_data(config, stage('elastic', 5, 16, 10).data).to_dict() == config.to_dict()
    assert config.packing == 'concat' and not config.weights


def test_a_config_of_an_older_run_has_todays_defaults():
    old = ConfigDict({'path': '', 'field': 'text', 'tokenizer': 'bytes', 'heldout_fraction': 0.05, 'max_bad_lines': 0})
    batch = next(make_iterator(old, split='train', batch_size=2, context=32, seed=0))
    today = next(make_iterator(default_data_config(), split='train', batch_size=2, context=32, seed=0))
    np.testing.assert_array_equal(batch['tokens'], today['tokens'])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'weights': {'x': 1}}, "unknown source in data.weights 'x'; known: 'a', 'b', 'c'"),
        ({'weights': {'a': -1}}, r'data.weights.a=-1 must be a number of at least 0'),
        ({'weights': {'a': float('nan')}}, 'must be a number of at least 0'),
        ({'weights': {'a': 0}}, 'data.weights are all 0'),
        ({'sources': {'a': {'pathh': 'x'}}}, "unknown key of data.sources.a 'pathh'"),
        ({'sources': {'a': {'path': 'x', 'format': 'csv'}}}, "unknown data.sources.a.format 'csv'"),
        ({'path': 'x'}, 'data.path=x and data.sources are both given'),
        ({'sources': {}, 'weights': {'a': 1}}, 'data.weights needs data.sources'),
        ({'packing': 'tight'}, "unknown data.packing 'tight'; known: 'concat', 'whole'"),
        ({'wieghts': {}}, "unknown key of config.data 'wieghts'"),
        ({'heldout_fraction': 2}, 'must be between 0 and 1'),
        ({'tokenizer': 'other'}, 'a stage cannot change data.tokenizer'),
    ],
)
def test_a_wrong_key_is_one_sentence(config, changes, message):
    with pytest.raises(UserError, match=message):
        sources_of(stage_data(config, changes))
