"""`elastic data` says what is in the sources and shows rows as the model sees them."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from elastic_jax.cli import run
from elastic_jax.config_file import load_config
from elastic_jax.data.config import default_data_config
from elastic_jax.data.pipeline import make_iterator
from elastic_jax.data.show import StageData, describe, render
from elastic_jax.errors import UserError
from elastic_jax.train.stage_data import stages_data
from tests.data.test_chat import CHAT

CONFIG = """
from elastic_jax.train.config import default_config, stage

def get_config(arg=''):
    config = default_config()
    config.data.sources = {{
        'chats': {{'path': {path!r}, 'field': 'messages', 'loss': 'answers', 'max_bad_lines': 1, 'heldout_fraction': 0.3}},
        'code': {{}},
    }}
    config.data.weights = {{'chats': 1, 'code': 3}}
    config.stages.first = stage('pretrain', 10, 64, 4)
    config.stages.last = stage('elastic', 20, 512, 2, data={{'weights': {{'chats': 1}}, 'packing': 'whole'}})
    config.curriculum = ('first', 'last')
    return config
"""


@pytest.fixture
def experiment(tmp_path):
    lines = [json.dumps({'messages': [*CHAT[:2], {'role': 'assistant', 'content': f'answer {i}'}]}) for i in range(20)]
    (tmp_path / 'chats.jsonl').write_text('\n'.join([*lines, '{broken']))
    (tmp_path / 'experiment.py').write_text(CONFIG.format(path=str(tmp_path / 'chats.jsonl')))
    return tmp_path / 'experiment.py'


def test_counts_fill_and_shares_are_those_of_the_data(experiment, capsys):
    assert run(['data', '--config', str(experiment), '--seconds', '0', '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    chats, code = found['sources']
    assert chats['train']['documents'] + chats['heldout']['documents'] == 20
    assert chats['bad_lines'] == 1 and 'chats.jsonl:21' in chats['bad'][0]
    # Scored of each chat: the answer, the end of its turn and the end of text, which has no bytes.
    answers = chats['train']['documents'] * len('answer 1<|im_end|>') + chats['train']['documents']
    assert 0 <= chats['train']['scored_tokens'] - answers <= 10  # ten answers have two digits
    assert code['train']['scored_tokens'] == code['train']['tokens'] - code['train']['documents'] == code['train']['bytes']
    first, last = found['stages']
    assert (first['context'], first['batch_size'], first['tokens']) == (64, 4, 2560)
    assert first['sources'][0]['share'] == 0.25 and first['fill'] == 1.0
    assert [source['name'] for source in last['sources']] == ['chats']
    tokens = chats['train']['tokens']
    rows = round(40 / last['sources'][0]['epochs'])
    assert tokens / 512 <= rows <= 2 + tokens / 384 and last['tokens_per_second'] > 0
    config = stages_data(load_config(str(experiment)))[1].config
    measured = make_iterator(config, split='train', batch_size=2, context=512, seed=10, start_batch=1)
    assert last['fill'] == (next(measured)['segment_ids'] > 0).mean()


def test_samples_show_every_token_with_its_segment_and_loss(experiment, capsys):
    run(['data', '--config', str(experiment), '--stage', 'last', '--samples', '2', '--tokens', '512', '--seconds', '0', '--json'])
    found = json.loads(capsys.readouterr().out)
    for sample in found['samples']:
        assert sum(segment['tokens'] for segment in sample['segments']) == 512
        for segment in sample['segments']:
            if segment['segment']:
                loss = ''.join(part['text'] for part in segment['text'] if part['loss'])
                whole = ''.join(part['text'] for part in segment['text'])
                assert re.fullmatch(r'answer \d+<\|im_end\|><end>', loss)
                assert whole.startswith('<|im_start|>system\nBe brief.') and 'Größe' in whole
    text = render(found, color=False)
    assert re.search(r'‹<\|im_start\|>system\nBe brief.*\n›answer \d+<\|im_end\|>‹\n›<end>', text, re.DOTALL)
    assert '── segment 2, ' in text and '── padding, ' in text and 'chats.jsonl:21' in text
    assert '\x1b[2m<|im_start|>' in render(found, color=True)


def test_samples_are_the_first_rows_of_training():
    config = default_data_config()
    found = describe([StageData('only', config, 48, 2, 5, 7)], samples=2, tokens=48, seconds=0)
    batch = next(make_iterator(config, split='train', batch_size=2, context=48, seed=7))
    for sample, ids in zip(found['samples'], batch['tokens'], strict=True):
        text = ''.join(part['text'] for segment in sample['segments'] for part in segment['text'])
        assert text.replace('<end>', '') == bytes(np.delete(ids, np.flatnonzero(ids == 256)).tolist()).decode(errors='replace')


def test_overrides_reach_the_config_and_mistakes_are_one_sentence(experiment, capsys):
    run(['data', '--config', str(experiment), '--config.stages.first.context=32', '--seconds', '0', '--json'])
    assert json.loads(capsys.readouterr().out)['stages'][0]['context'] == 32
    for arguments, message in (
        (['--stage', 'frist'], "did you mean 'first'"),
        (['--config.data.pth=x'], "unknown config key 'data.pth'"),
        (['--config.data.packing=tight'], 'unknown data.packing'),
        (['--samples', '2x'], 'invalid int value'),
        (['--sample', '2'], 'did you mean --samples'),
    ):
        with pytest.raises(UserError, match=message):
            run(['data', '--config', str(experiment), *arguments])


def test_the_command_runs_alone(experiment):
    command = [sys.executable, '-m', 'elastic_jax', 'data', '--config', str(experiment), '--seconds', '0']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 'row 0 of ' in done.stdout and 'M tokens/s' in done.stdout and done.stderr == ''
