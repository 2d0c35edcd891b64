"""The main job on a tiny experiment, in this process: what it leaves behind, and what it refuses."""

import json
import signal

import jax
import numpy as np
import pytest
from etils import epath

from elastic_jax.checkpoint.restore import read_manifest, restore_slice
from elastic_jax.errors import UserError, WorkError
from elastic_jax.metrics import read_metrics
from elastic_jax.nest.budgets import metric
from elastic_jax.nest.slice import slice_params
from elastic_jax.train.loop import train
from elastic_jax.train.reporting import StepReport
from elastic_jax.train.signals import Stopped
from tests.train.tiny_experiment import get_config


def test_a_run_leaves_config_metrics_checkpoints_parent_and_report(finished_run):
    assert json.loads((finished_run / 'config.json').read_text())['name'] == 'tiny'
    for name in ('report.html', 'pareto.png', 'parent/params', 'checkpoints/21/params', 'checkpoints/21/opt_state'):
        assert (finished_run / name).exists(), name
    for item in ('router', 'ordering', 'data', 'manifest'):
        assert (finished_run / 'checkpoints' / '21' / item).exists(), item
    kept = sorted(int(path.name) for path in (finished_run / 'checkpoints').iterdir())
    assert len(kept) == 2 and kept[-1] == 21
    steps = [line['step'] for line in read_metrics(finished_run) if line['kind'] == 'train']
    assert steps == list(range(1, 22))


def test_budgets_meet_their_targets_or_say_why_and_nest_in_each_other(finished_run):
    manifest = read_manifest(finished_run)
    archs = [budget.arch for budget in manifest.budgets.values()]
    assert list(manifest.budgets) == ['full', 'mid', 'small']
    assert archs[2].nests_in(archs[1]) and archs[1].nests_in(archs[0])
    frozen = next(line for line in read_metrics(finished_run) if line['kind'] == 'frozen')['budgets']
    measure = metric('parameters')
    for name, arch in zip(manifest.budgets, archs, strict=True):
        share = measure(arch, None) / measure(manifest.arch, None)
        assert share == pytest.approx(frozen[name]['share'])
        assert abs(share / frozen[name]['target'] - 1) <= 0.05 or frozen[name]['note']


def test_saved_scores_are_those_of_the_restored_slices(finished_run):
    """The manifest's held-out loss is what a plain forward pass over the restored slice gives."""
    from elastic_jax.data.pipeline import heldout_batches
    from elastic_jax.model.decoder import logits

    manifest = read_manifest(finished_run)
    batch = next(heldout_batches(get_config().data, 4, 32, 1))
    for budget in manifest.budgets.values():
        params = restore_slice(finished_run, budget.arch)
        log_q = jax.nn.log_softmax(logits(params, batch['tokens'], budget.arch, batch['segment_ids']))
        nats = -np.take_along_axis(np.asarray(log_q), batch['targets'][..., None], axis=-1)[..., 0]
        assert budget.metrics['loss'] == pytest.approx(
            float((nats * batch['loss_mask']).sum() / batch['loss_mask'].sum()), rel=1e-4
        )


def test_a_manifest_has_every_budgets_latest_scores(finished_run):
    """Step 18 is saved in the last stage, after the evaluation of step 16 in the one before."""
    manifest = read_manifest(finished_run / 'checkpoints' / '18')
    lines = [line for line in read_metrics(finished_run) if line['kind'] == 'eval' and line['step'] == 16]
    # Lines are rounded.
    expected = {line['budget']: pytest.approx({key: line[key] for key in ('loss', 'bits_per_byte')}, rel=1e-6) for line in lines}
    assert expected and {name: dict(budget.metrics) for name, budget in manifest.budgets.items()} == expected


def test_evaluations_fall_on_the_steps_that_the_config_says_also_where_stages_end(finished_run):
    """Stages end at steps 8, 12, 17 and 21; the end of the run has an evaluation of its own."""
    lines = [line for line in read_metrics(finished_run) if line['kind'] == 'eval' and line['budget'] == 'full']
    expected = [(4, 'pretrain'), (8, 'pretrain'), (12, 'search'), (16, 'short'), (20, 'long')]
    assert [(line['step'], line['stage']) for line in lines] == expected


def test_a_restored_slice_is_the_slice_of_the_restored_whole(finished_run):
    manifest = read_manifest(finished_run)
    whole = restore_slice(finished_run, manifest.arch)
    for budget in manifest.budgets.values():
        jax.tree.map(
            np.testing.assert_array_equal,
            restore_slice(finished_run, budget.arch),
            slice_params(whole, manifest.arch, budget.arch, manifest.layout),
        )


def test_running_a_finished_experiment_again_only_reports(finished_run, capsys):
    before = (finished_run / 'metrics.jsonl').read_text()
    train(get_config(), finished_run)
    assert (finished_run / 'metrics.jsonl').read_text() == before
    assert 'small' in capsys.readouterr().out


def test_another_experiments_workdir_is_refused_by_key(finished_run):
    config = get_config()
    config.optimizer.lr = 0.5
    with pytest.raises(UserError, match=r'optimizer\.lr: 0\.0001 there, 0\.5 here'):
        train(config, finished_run)
    config = get_config()
    config.log_every = 7  # changes no number of the result
    train(config, finished_run)


def test_widths_by_hand_and_sampled_budgets(tmp_path):
    train(get_config('by_hand,sampled'), tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest.budgets['small'].arch.widths().items() >= {'embed': 8, 'layers': 3}.items()
    assert manifest.budgets['small'].arch.pattern.count('.') == 1
    drawn = [line for line in read_metrics(tmp_path) if line['kind'] == 'train' and line['stage'] == 'short']
    assert all(sum(key.startswith('loss/') for key in line) == 2 for line in drawn)


def test_stop_signal_saves_and_the_same_command_goes_on(tmp_path, monkeypatch):
    steps = []
    write = StepReport.__call__

    def stop_at_ten(report):
        write(report)
        steps.append(report.step)
        if report.step == 10:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(StepReport, '__call__', stop_at_ten)
    with pytest.raises(Stopped, match='run the same command'):
        train(get_config('by_hand'), tmp_path)
    stopped_at = read_manifest(tmp_path).step
    assert 10 <= stopped_at <= 12
    train(get_config('by_hand'), tmp_path)
    assert steps == list(range(1, 18))


def test_non_finite_losses_stop_the_run_with_the_last_checkpoint_intact(tmp_path):
    config = get_config('by_hand')
    config.stages.pretrain.optimizer = {'lr': 1e38, 'clip': 1e38, 'warmup': 1, 'final_lr': 1e38}
    config.max_bad_steps = 2
    config.checkpoint.every = 1
    with pytest.raises(WorkError, match=r'2 steps in a row had a non-finite loss.*checkpoint of step \d+ is intact'):
        train(config, tmp_path)
    assert read_manifest(tmp_path).stage == 'pretrain'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'widths': {'small': 'embed=20'}}, 'embed=20 does not nest: the parent has 16'),
        ({'widths': {'small': 'embde=8'}}, "unknown axis 'embde'; did you mean 'embed'"),
        ({'widths': {'smal': 'embed=8'}}, "unknown budget in config.widths 'smal'; did you mean 'small'"),
        ({'layout': {'mlp': 3}}, r'mlp@3=32 is not a multiple of the layout.s G=3; take 30 or 33'),
        ({'budgets': {'tiny': 0.01}}, 'budget tiny asks for 1.0% of the parent, but the smallest choices reach'),
        ({'metric': 'params'}, "unknown budget metric 'params'; did you mean 'parameters'"),
        ({'data': {'path': '/no/such/file.txt'}}, r'/no/such/file\.txt cannot be read'),
        ({'arch': {'pattern': 'M?'}}, "pattern 'M\\?' has '\\?'"),
        ({'kernels': 'palas'}, "unknown kernels 'palas'; did you mean 'pallas'"),
        ({'curriculum': ('pretrian',)}, "unknown stage in config.curriculum 'pretrian'; did you mean 'pretrain'"),
    ],
    ids=str,
)
def test_bad_configs_are_one_sentence_before_anything_starts(tmp_path, change, message):
    config = get_config('by_hand' if 'widths' in change else '')
    for section, values in change.items():
        if isinstance(values, dict):
            config[section].update(values)
        else:
            config[section] = values
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'checkpoints').exists() or not any((tmp_path / 'run' / 'checkpoints').iterdir())


def test_a_config_can_be_mended_while_nothing_is_trained_under_it(tmp_path):
    from elastic_jax.train.workdir import claim_workdir

    claim_workdir(tmp_path, get_config())
    mended = get_config()
    mended.optimizer.lr = 0.5
    claim_workdir(tmp_path, mended)
    assert json.loads((tmp_path / 'config.json').read_text())['optimizer']['lr'] == 0.5
    (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
    with pytest.raises(UserError, match='holds another experiment'):
        claim_workdir(tmp_path, get_config())
    mended.evaluators.notes = {'data': 'notes.txt'}  # nothing that is trained depends on it
    claim_workdir(tmp_path, mended)


def test_a_run_of_a_version_with_fewer_keys_goes_on(tmp_path):
    from elastic_jax.train.workdir import check_workdir, claim_workdir

    claim_workdir(epath.Path(tmp_path), get_config())
    (tmp_path / 'checkpoints' / '3').mkdir(parents=True)
    older = json.loads((tmp_path / 'config.json').read_text())
    del older['scan_layers'], older['stages']['short']['sandwich'], older['optimizer']['weight_decay']
    (tmp_path / 'config.json').write_text(json.dumps(older))
    check_workdir(epath.Path(tmp_path), get_config())
    config = get_config()
    config.scan_layers = True
    with pytest.raises(UserError, match='scan_layers: False there, True here'):
        check_workdir(epath.Path(tmp_path), config)


def test_a_runs_tokenizer_is_kept_beside_its_checkpoints(tmp_path):
    from elastic_jax.train.workdir import claim_workdir, keep_tokenizer

    (tmp_path / 'parent').mkdir()
    for name in ('tokenizer.json', 'tokenizer_config.json', 'model.safetensors'):
        (tmp_path / 'parent' / name).write_text(name)
    keep_tokenizer(epath.Path(tmp_path / 'run'), str(tmp_path / 'parent'))
    kept = {path.name: path.read_text() for path in (tmp_path / 'run' / 'tokenizer').iterdir()}
    assert kept == {'tokenizer.json': 'tokenizer.json', 'tokenizer_config.json': 'tokenizer_config.json'}
    keep_tokenizer(epath.Path(tmp_path / 'bytes'), 'bytes')
    assert not (tmp_path / 'bytes').exists()
    # Another one takes the place of what a first attempt left.
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'tokenizer.json').write_text('other')
    config = get_config()
    config.data.tokenizer = str(tmp_path / 'other')
    (tmp_path / 'run' / 'tokenizer' / 'notes.txt').write_text('mine')  # and nothing else is touched
    claim_workdir(epath.Path(tmp_path / 'run'), config)
    kept = {path.name: path.read_text() for path in (tmp_path / 'run' / 'tokenizer').iterdir()}
    assert kept == {'tokenizer.json': 'other', 'notes.txt': 'mine'}
