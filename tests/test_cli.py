"""The command line: what each verb prints, its exit status, and its one sentence for a mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest

import elastic_jax
from elastic_jax.checkpoint.restore import restore_slice
from elastic_jax.cli import VERBS, main
from elastic_jax.terminal import json_text


def run(capsys, *argv):
    """(exit status, stdout, stderr) of one command, in this process."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(map(str, argv)))
    captured = capsys.readouterr()
    return exit_info.value.code, captured.out, captured.err


def test_inspect_prints_a_table_or_one_json_object(capsys, finished_run):
    status, out, _ = run(capsys, 'inspect', '--checkpoint', finished_run)
    assert status == 0 and [line.split()[0] for line in out.splitlines()[1:4]] == ['full', 'mid', 'small']
    assert max(map(len, out.splitlines())) <= 80
    status, out, _ = run(capsys, 'inspect', '--checkpoint', finished_run, '--json')
    budgets = json.loads(out)['budgets']
    assert [budget['name'] for budget in budgets] == ['full', 'mid', 'small']
    for budget in budgets:
        whole = restore_slice(finished_run, elastic_jax.open_checkpoint(finished_run).budgets[budget['name']].arch)
        assert budget['parameters'] == sum(leaf.size for group in whole.values() for leaf in group.values())
        assert {'widths', 'active_parameters', 'bytes'} <= budget.keys()


@pytest.mark.parametrize('verb', [['train', '--workdir=run'], ['cache-teacher', '--json']])
def test_verbs_that_processes_share_join_them(capsys, monkeypatch, verb):
    started = []
    monkeypatch.setattr('elastic_jax.parallel.supervise.supervise', lambda commands: started.append(commands[0][1][3:]) or 0)
    for name, value in {'COORDINATOR': '127.0.0.1:9', 'PROCESSES': '2', 'PROCESS_ID': '1'}.items():
        monkeypatch.setenv(f'ELASTIC_{name}', value)
    assert run(capsys, *verb, '--config=x.py', '--config.seed=1')[0] == 0
    assert started == [[verb[0], '--config=x.py', *verb[1:], '--config.seed=1']]


def test_slice_writes_an_ordinary_checkpoint_with_the_same_numbers(capsys, finished_run, tmp_path):

    for flags, load in (
        (('--budget', 'small'), {'budget': 'small'}),
        (('--widths', 'embed=8,mlp@3=16'), {'widths': {'embed': 8, 'mlp@3': 16}}),
    ):
        out = tmp_path / flags[0].strip('-')
        status, _, err = run(capsys, 'slice', '--checkpoint', finished_run, *flags, '--out', out)
        assert status == 0 and str(out) in err
        whole, cut = elastic_jax.open_checkpoint(finished_run).load(**load), elastic_jax.open_checkpoint(out).load('full')
        tokens = np.arange(24).reshape(2, 12)
        np.testing.assert_array_equal(cut.logits(tokens), whole.logits(tokens))
        assert cut.arch == whole.arch
    status, _, err = run(capsys, 'slice', '--checkpoint', finished_run, '--budget', 'small', '--out', tmp_path / 'budget')
    assert status == 2 and 'exists already' in err


def test_an_export_of_a_run_from_scratch_names_the_longest_context_that_it_was_trained_on(capsys, finished_run, tmp_path):
    out = tmp_path / 'hf'
    status, _, err = run(capsys, 'slice', '--checkpoint', finished_run, '--budget', 'small', '--format', 'hf', '--out', out)
    assert status == 0, err
    assert json.loads((out / 'config.json').read_text())['max_position_embeddings'] == 64


def test_slice_in_bfloat16_halves_the_weights(capsys, finished_run, tmp_path):
    out = tmp_path / 'half'
    assert run(capsys, 'slice', '--checkpoint', finished_run, '--budget', 'small', '--out', out, '--dtype', 'bfloat16')[0] == 0

    half, whole = elastic_jax.open_checkpoint(out).load('full'), elastic_jax.open_checkpoint(finished_run).load('small')
    assert half.params['layer_003']['up'].dtype == 'bfloat16' and half.params['layer_000']['a_log'].dtype == 'float32'
    np.testing.assert_array_equal(half.params['layer_003']['up'], whole.params['layer_003']['up'].astype('bfloat16'))


def test_eval_scores_every_budget_on_held_out_data_or_a_file(capsys, finished_run, tmp_path):
    status, out, _ = run(capsys, 'eval', '--checkpoint', finished_run, '--json', '--context', 32, '--batches', 1)
    scores = {entry['name']: entry for entry in json.loads(out)['budgets']}
    assert status == 0 and list(scores) == ['full', 'mid', 'small']
    text = tmp_path / 'notes.txt'
    text.write_text('import os\n' * 40)
    status, out, _ = run(
        capsys, 'eval', '--checkpoint', finished_run, '--budgets', 'small', '--data', text, '--json', '--context', 32
    )
    (score,) = json.loads(out)['budgets']
    assert status == 0 and score['name'] == 'small' and score['bytes'] == 400 - 1


def test_generate_is_deterministic_and_differs_between_seeds(capsys, finished_run):
    common = ('generate', '--checkpoint', finished_run, '--prompt', 'def ', '--max-tokens', 12, '--budget', 'small', '--json')
    texts = [json.loads(run(capsys, *common, '--temperature', 1.0, '--seed', seed)[1])['text'] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert run(capsys, *common[:-1])[0] == 0


def test_drafts_of_a_smaller_size_leave_the_text_as_it_is(capsys, finished_run):
    common = ('generate', '--checkpoint', finished_run, '--prompt', 'x = ', '--max-tokens', 12, '--json')
    plain = json.loads(run(capsys, *common)[1])
    status, out, err = run(capsys, *common, '--draft', 'small', '--drafts', 3, '--compare')
    drafted = json.loads(out)
    assert status == 0 and drafted['text'] == plain['text'] and drafted['seconds'] > 0
    assert drafted['speculation']['drafted'] == 3 * drafted['speculation']['rounds'] and 'drafts kept' in err
    assert drafted['speculation']['plain_text'] == plain['text'] and 'x the tokens per second of plain' in err
    status, _, err = run(capsys, *common, '--compare')
    assert status == 2 and '--draft' in err


def test_one_size_thinks_and_another_answers(capsys, finished_run):
    common = ('generate', '--checkpoint', finished_run, '--prompt', 'x = ', '--max-tokens', 8)
    pair = (*common, '--think', 'small', '--answer', 'full', '--thinking-tokens', 5)
    status, out, _ = run(capsys, *pair, '--json')
    result, checkpoint = json.loads(out), elastic_jax.open_checkpoint(finished_run)
    assert status == 0
    assert result['thinking'] == checkpoint.load('small').generate('x = <think>', max_tokens=5)
    assert result['tokens'] == {'thinking': 5, 'continued': 0, 'answer': 8}
    assert result['seconds']['to_answer'] > result['seconds']['thinking'] > 0
    assert 0 < result['memory']['slices_bytes'] < result['memory']['resident_bytes']
    status, out, err = run(capsys, *pair, '--switch', 'both', '--json')
    both = json.loads(out)
    assert status == 0 and both['text'] == result['text'] and both['other']['thinking'] == result['thinking']
    assert 0 <= both['agreement'] <= 1 and 'of the answer tokens agree' in err
    status, out, _ = run(capsys, *pair, '--opening', ' [', '--closing', '] ', '--entropy', 0)
    assert status == 0 and out.startswith(' [') and '] ' in out
    status, _, err = run(capsys, *common, '--think', 'small')
    assert status == 2 and '--think and --answer go together' in err


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (('inspect', '--checkpoint', '/no/such/place'), '/no/such/place does not exist'),
        (('inspect', '--checkpoint', 'README.md'), 'README.md is a file; give a workdir'),
        (('inspekt',), "unknown verb 'inspekt'; did you mean 'inspect'"),
        (('inspect', '--checkpoint', 'RUN', '--config.seed=1'), 'inspect takes no config'),
        (('train', '--confg=x'), 'did you mean --config'),
        (('inspect', '--chekpoint', 'x', '--checkpoint', 'y'), 'did you mean --checkpoint'),
        (('slice', '--checkpoint', 'RUN', '--budget', 'smal', '--out', 'x'), "unknown budget 'smal'; did you mean 'small'"),
        (('slice', '--checkpoint', 'RUN', '--widths', 'embed', '--out', 'x'), "cannot read 'embed'"),
        (('slice', '--checkpoint', 'RUN', '--widths', 'embed=999', '--out', 'x'), 'embed=999 does not nest: the parent has 16'),
        (('slice', '--checkpoint', 'RUN', '--widths', 'emned=8', '--out', 'x'), "unknown axis 'emned'; did you mean 'embed'"),
        (('eval', '--checkpoint', 'RUN', '--data', '/no/file.txt'), '/no/file.txt cannot be read'),
        (('generate', '--checkpoint', 'RUN', '--prompt', ''), 'a prompt is empty'),
        (('generate', '--checkpoint', '/no', '--prompt', '-- a comment'), '/no does not exist'),
        (('generate', '--checkpoint', '/no', '--budget', '--prompt', 'a'), 'argument --budget: expected one argument'),
        (('generate', '--checkpoint', 'RUN', '--prompt', 'a', '--temperature', '-1'), 'temperature=-1.0 must be at least 0'),
        (('generate', '--checkpoint', '/no', '--prompt', 'a', '--drafts', '3'), 'name that size with --draft'),
        (('generate', '--checkpoint', '/no', '--prompt', 'a', '--opening', 'x', '--fill', 'mean'), '--opening, --fill: nobody'),
        (('report', '--workdir', '/tmp'), '/tmp'),
        (('train',), 'required: --config, --workdir'),
        (('train', '--config', 'nothing.py', '--workdir', 'w'), 'there is no file nothing.py'),
        (('train', '--config', 'experiments/quickstart.py'), 'required: --workdir'),
        (('train', '--config=experiments/quickstart.py:fast', '--workdir', 'w'), 'takes no argument or smoke'),
        (
            ('train', '--config=experiments/quickstart.py', '--workdir', 'w', '--config.optimizer.lrr=1'),
            "unknown config key 'optimizer.lrr'; did you mean 'optimizer.lr'",
        ),
        (
            ('train', '--config=experiments/quickstart.py', '--workdir', 'w', '--config.seed=blue'),
            'cannot read the value given for --config.seed',
        ),
        (
            ('train', '--config=experiments/quickstart.py', '--workdir', 'w', '--config.sed=1', '--config.seed=blue'),
            "unknown config key 'sed'; did you mean 'seed'?; cannot read the value given for --config.seed",
        ),
        (
            ('train', '--config=experiments/quickstart.py', '--workdir', 'w', '--config.teacher=slef', '--config.metric=bytes'),
            "did you mean 'self'? known: frozen, cached, self, none; unknown budget metric 'bytes'",
        ),
    ],
    ids=lambda value: ' '.join(value) if isinstance(value, tuple) else '',
)
def test_mistakes_get_one_sentence_and_status_2(capsys, finished_run, tmp_path, monkeypatch, argv, message):
    status, out, err = run(capsys, *(str(finished_run) if arg == 'RUN' else arg for arg in argv))
    assert status == 2, err
    assert message in err and out == ''
    assert err.startswith('elastic: ') and len(err.strip().splitlines()) == 1, err


def test_as_a_process_it_shows_the_path_through_the_verbs_and_fails_without_a_traceback(finished_run):
    shown = subprocess.run([sys.executable, '-m', 'elastic_jax'], capture_output=True, text=True)
    assert shown.returncode == 0 and 'elastic train' in shown.stdout and 'elastic slice' in shown.stdout
    failed = subprocess.run(
        [sys.executable, '-m', 'elastic_jax', 'inspect', '--checkpoint', '/no'], capture_output=True, text=True
    )
    assert (failed.returncode, failed.stdout) == (2, '') and 'Traceback' not in failed.stderr


@pytest.mark.parametrize('verb', VERBS)
def test_every_verbs_help_has_an_example(capsys, verb):
    status, out, _ = run(capsys, verb, '--help')
    assert status == 0 and f'elastic {verb}' in out.partition('example')[2]


def test_json_has_no_numbers_that_json_has_not():
    text = json_text({'scores': [1.0, float('nan')], 'own': {'loss': float('inf'), 'name': 'nan'}, 'bits': (2.5,)})
    assert json.loads(text) == {'scores': [1.0, None], 'own': {'loss': None, 'name': 'nan'}, 'bits': [2.5]}
