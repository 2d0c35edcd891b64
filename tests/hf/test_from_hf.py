"""The whole way by the commands: a Hugging Face parent in, trained elastically, a slice of it out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from elastic_jax.api import open_checkpoint
from tests.hf.oracle import CASES, LLAMA, load_model, make_model, torch_logits
from tests.hf.ours import assert_close

ROOT = Path(__file__).parents[2]


def elastic(*arguments: object) -> str:
    command = [sys.executable, '-m', 'elastic_jax', *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_import_train_slice_and_load_in_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, 'parent', ('llama', LLAMA | {'vocab_size': 264, 'hidden_size': 64, 'intermediate_size': 96}))
    make_model('parent', tmp_path / 'parent')
    elastic('import', '--hf', tmp_path / 'parent', '--checkpoint', tmp_path / 'imported')
    experiment = f'experiments/elastic_from_hf.py:{tmp_path / "imported"},small=0.6,smoke'
    elastic('train', '--config', experiment, '--workdir', tmp_path / 'run')
    listed = json.loads(elastic('inspect', '--checkpoint', tmp_path / 'run', '--json'))['budgets']
    assert [budget['name'] for budget in listed] == ['full', 'small']
    elastic('slice', '--checkpoint', tmp_path / 'run', '--budget', 'small', '--format', 'hf', '--out', tmp_path / 'out')
    model = open_checkpoint(tmp_path / 'run').load('small')
    tokens_2xT = np.random.default_rng(0).integers(0, 264, (2, 30))
    assert_close(model.logits(tokens_2xT), torch_logits(load_model(tmp_path / 'out'), tokens_2xT))
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['hidden_size'] == listed[1]['widths']['embed'] < 64
