"""The whole way by the commands: a Hugging Face parent in, trained elastically, a slice of it out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elastic_jax.api import open_checkpoint
from elastic_jax.config_file import load_config
from elastic_jax.hf.importing import import_checkpoint
from elastic_jax.train.loop import train
from tests.data.bpe import write_tokenizer
from tests.hf.oracle import CASES, HYBRID, LLAMA, MAMBA2, QWEN, QWEN_MOE, load_model, make_model, torch_logits
from tests.hf.ours import assert_close

ROOT = Path(__file__).parents[2]


def elastic(*arguments: object) -> str:
    command = [sys.executable, '-m', 'elastic_jax', *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_import_train_slice_and_load_in_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, 'parent', ('llama', LLAMA | {'vocab_size': 400, 'hidden_size': 64, 'intermediate_size': 96}))
    make_model('parent', tmp_path / 'parent')
    write_tokenizer(tmp_path / 'parent')
    elastic('import', '--hf', tmp_path / 'parent', '--checkpoint', tmp_path / 'imported')
    experiment = f'experiments/elastic_from_hf.py:{tmp_path / "imported"},small=0.6,smoke'
    data = [f'--config.data.path={ROOT}/elastic_jax/hf/*.py', '--config.data.heldout_fraction=0.3']
    elastic('train', '--config', experiment, '--workdir', tmp_path / 'run', *data)
    listed = json.loads(elastic('inspect', '--checkpoint', tmp_path / 'run', '--json'))['budgets']
    assert [budget['name'] for budget in listed] == ['full', 'small']
    elastic('slice', '--checkpoint', tmp_path / 'run', '--budget', 'small', '--format', 'hf', '--out', tmp_path / 'out')
    model = open_checkpoint(tmp_path / 'run').load('small')
    tokens_2xT = np.random.default_rng(0).integers(0, 400, (2, 30))
    assert_close(model.logits(tokens_2xT), torch_logits(load_model(tmp_path / 'out'), tokens_2xT))
    assert (tmp_path / 'out' / 'tokenizer.json').read_bytes() == (tmp_path / 'parent' / 'tokenizer.json').read_bytes()
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['hidden_size'] == listed[1]['widths']['embed'] < 64


PARENTS = {
    'nemotron_h dense': ('nemotron_h', HYBRID | {'hybrid_override_pattern': 'M-*'}),
    'nemotron_h MoE': ('nemotron_h', HYBRID | {'hybrid_override_pattern': 'ME*'}),
    'llama': ('llama', LLAMA | {'num_hidden_layers': 1}),
    'qwen3': ('qwen3', QWEN | {'num_hidden_layers': 1}),
    'qwen3_moe': ('qwen3_moe', QWEN_MOE | {'num_hidden_layers': 1}),
    'mamba2': ('mamba2', MAMBA2),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', PARENTS)
def test_a_parent_of_every_family_is_trained_and_its_slices_are_the_same_in_transformers(name, tmp_path, monkeypatch):
    model_type, entries = PARENTS[name]
    monkeypatch.setitem(CASES, name, (model_type, entries | {'vocab_size': 264}))
    make_model(name, tmp_path / 'parent')
    import_checkpoint(tmp_path / 'parent', tmp_path / 'imported')
    config = load_config(f'{ROOT}/experiments/elastic_from_hf.py:{tmp_path / "imported"},small=0.7,smoke')
    config.curriculum, config.mesh.fsdp = ('search', 'short'), 1
    config.stages.search.steps = config.stages.short.steps = 2
    train(config, tmp_path / 'run')
    checkpoint = open_checkpoint(tmp_path / 'run')
    assert checkpoint.budgets['small'].costs['parameters'] < checkpoint.budgets['full'].costs['parameters']
    tokens_2xT = np.random.default_rng(0).integers(0, 264, (2, 30))
    for budget in checkpoint.budgets:
        folder = checkpoint.export(budget, tmp_path / budget)
        assert_close(checkpoint.load(budget).logits(tokens_2xT), torch_logits(load_model(folder), tokens_2xT))
        assert json.loads((folder / 'config.json').read_text())['model_type'] == model_type
