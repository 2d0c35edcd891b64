"""What experiments compare with: a parent trained alone, units in random order, a slice that begins from random weights."""

import dataclasses
import json
import math
import shutil
from unittest import mock

import jax
import numpy as np
import pytest

from elastic_jax.api import open_checkpoint
from elastic_jax.errors import UserError
from elastic_jax.metrics import read_metrics
from elastic_jax.model.decoder import logits
from elastic_jax.train import loop
from elastic_jax.train.config import stage
from elastic_jax.train.loop import train
from elastic_jax.train.setup import make_plan
from tests.train.conftest import parent_config
from tests.train.tiny_experiment import get_config


def control(folder, **changes):
    """Elastic training that leaves the weights as they begin: its rate is nothing."""
    config = get_config('by_hand')
    config.parent.checkpoint = str(folder)
    config.budgets = {'full': 1.0, 'small': 0.5}
    config.widths = {'small': 'embed=8,mlp=16'}
    config.optimizer.update({'lr': 1e-30, 'final_lr': 1e-30})
    config.curriculum = ('short',)
    config.stages.short.update({'steps': 1, 'accumulate': 1, 'probabilities': {'small': 1.0}})
    config.eval.every = 0
    for key, value in changes.items():
        config[key].update(value)
    return config


def test_a_parent_trained_alone_is_scored_and_has_one_budget(parent):
    checkpoint = open_checkpoint(parent)
    assert list(checkpoint.budgets) == ['full'] and checkpoint.manifest.stage == 'done'
    final = next(line for line in read_metrics(parent) if line['kind'] == 'final')
    assert final['rows'][0]['bits_per_byte'] == final['parent']['bits_per_byte'] > 0
    assert (parent / 'report.html').exists()


def test_an_evaluation_that_fails_at_the_end_costs_no_training_and_can_be_mended(parent, tmp_path):
    run, stage = mock.MagicMock(), make_plan(parent_config()).stages[-1]
    run.evaluator.final.side_effect = OSError('no such file')
    with pytest.raises(OSError, match='no such file'):
        loop._end(run, stage)
    run.store.save.assert_called_once_with(run.at)

    # So it is left: saved at the end of its last stage, with part of the last evaluation's lines.
    workdir = tmp_path / 'run'
    shutil.copytree(parent, workdir)
    path = workdir / 'checkpoints' / '3' / 'manifest' / 'metadata'
    ended = dataclasses.replace(open_checkpoint(parent).manifest, stage='pretrain', stage_step=3)
    path.write_text(json.dumps(ended.to_json()))
    config = parent_config()
    config.samples.temperature = 0.5  # what is mended may change
    train(config, workdir)
    lines = [[line for line in read_metrics(own) if line['kind'] != 'goodput'] for own in (parent, workdir)]
    assert lines[0] == lines[1]
    ours, theirs = open_checkpoint(workdir), open_checkpoint(parent)
    assert ours.manifest == theirs.manifest and ours.manifest.stage == 'done'


def test_a_slice_from_scratch_in_a_parent_of_random_order(parent, tmp_path):
    train(control(parent, parent={'scratch': 'small'}, calibrate={'order': 'random'}), tmp_path)
    begun, teacher = open_checkpoint(tmp_path), open_checkpoint(tmp_path / 'parent')
    started, ordered, small = begun.load('full').params, teacher.load('full').params, begun.budgets['small'].arch
    # The teacher is the parent, its units in another order.
    tokens = np.arange(24).reshape(2, 12) * 7 % 256
    original = open_checkpoint(parent).load('full')
    wanted = np.asarray(original.logits(tokens))
    np.testing.assert_allclose(logits(ordered, tokens, teacher.arch), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    moved = np.any(np.asarray(ordered['embedding']['table']) != np.asarray(original.params['embedding']['table']))
    assert moved
    # The slice's weights are new, of the size that the slice's own fan-in asks for; all else is the parent's.
    up, whole = np.asarray(started['layer_001']['up']), np.asarray(ordered['layer_001']['up'])
    inside = np.zeros(up.shape, bool)
    inside[:8, :, :16] = True
    np.testing.assert_array_equal(up[~inside], whole[~inside])
    assert np.all(up[inside] != whole[inside])
    assert up[inside].std() == pytest.approx(1 / math.sqrt(small.embed), rel=0.25)
    assert jax.tree.all(jax.tree.map(lambda leaf: np.isfinite(leaf).all(), started))


def test_a_control_that_cannot_be_is_said_at_once(parent):
    with pytest.raises(UserError, match=r"unknown budget in parent\.scratch .* 'medium'"):
        make_plan(control(parent, parent={'scratch': 'medium'}))
    with pytest.raises(UserError, match=r"unknown calibrate\.order 'rnadom'; did you mean 'random'"):
        make_plan(control(parent, calibrate={'order': 'rnadom'}))


def test_a_budget_of_the_whole_parent_may_have_any_name(parent, tmp_path):
    config = control(parent)
    config.budgets = {'compact': 0.5, 'large': 0.75, 'whole': 1.0}
    config.widths = {'compact': 'embed=8,mlp=16', 'large': 'embed=12,mlp=24'}
    config.stages.short.probabilities = {}
    train(config, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.budgets) == ['whole', 'large', 'compact'], 'largest first'
    assert checkpoint.budgets['whole'].arch == checkpoint.arch
    trained = next(line for line in read_metrics(tmp_path) if line['kind'] == 'train')
    assert {'loss/whole', 'loss/large', 'loss/compact'} <= trained.keys()


def test_a_run_that_ends_with_its_search_has_the_budgets_it_found(parent, tmp_path):
    config = control(parent)
    config.widths = {}
    config.choices.update({'embed': (1.0, 0.5), 'mlp': (1.0, 0.5)})
    config.stages.search = stage('search', 1, 32, 4)
    config.curriculum = ('search',)
    # At a scale that leaves nothing soft, masks are the slices of the router's first choices, which any cost may have here.
    config.router.end_scale, config.tolerance = 1e6, 1.0
    train(config, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    frozen = next(line for line in read_metrics(tmp_path) if line['kind'] == 'frozen')['budgets']
    assert list(checkpoint.budgets) == ['full', 'small'] and checkpoint.manifest.stage == 'done'
    assert checkpoint.budgets['small'].arch.widths() == frozen['small']['widths']
    assert checkpoint.budgets['small'].metrics['bits_per_byte'] > 0
    hardening = {line['budget']: line for line in read_metrics(tmp_path) if line['kind'] == 'hardening'}['small']
    assert hardening['soft_loss'] == pytest.approx(hardening['hard_loss'], rel=1e-4)
