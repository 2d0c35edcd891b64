"""Invariant 7, one process: killed at random moments and resumed = never killed, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from elastic_jax.checkpoint.manager import ARRAY_ITEMS, CheckpointManager
from elastic_jax.metrics import read_metrics

ROOT = Path(__file__).parents[2]
LAST_STEP = 21


def start(workdir: Path, cache: Path) -> subprocess.Popen:
    command = [sys.executable, '-m', 'elastic_jax', 'train', '--config=tests/train/tiny_experiment.py', f'--workdir={workdir}']
    environment = {**os.environ, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    return subprocess.Popen(
        [*command, f'--config.compilation_cache={cache}'],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def everything(workdir: Path) -> dict:
    """All arrays of the last checkpoint, its data position, and the metrics that do not tell the time."""
    manager = CheckpointManager(workdir)
    items = manager.restore(LAST_STEP, dict.fromkeys(ARRAY_ITEMS))
    manager.close()
    timing = ('seconds', 'tokens_per_second', 'data_seconds', 'flops_per_second')
    lines = [line for line in read_metrics(workdir) if line['kind'] != 'goodput']
    lines = [{key: value for key, value in line.items() if key not in timing} for line in lines]
    return {'items': jax.tree.map(np.asarray, items), 'lines': lines}


def run_to_end(workdir: Path, cache: Path) -> None:
    process = start(workdir, cache)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output


def compiled_steps(cache: Path) -> set[str]:
    return {path.name for path in cache.glob('jit_step-*-cache')}


@pytest.mark.slow
def test_killed_at_random_moments_is_never_killed(tmp_path):
    cache, rng = tmp_path / 'cache', random.Random(0)
    run_to_end(tmp_path / 'undisturbed', cache)
    steps = compiled_steps(cache)
    assert len(steps) == 4  # one per stage
    metrics = tmp_path / 'killed' / 'metrics.jsonl'
    for target in (*sorted(rng.sample(range(2, 15), 3)), 19):
        process = start(tmp_path / 'killed', cache)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (metrics.exists() and f'"step": {target},' in metrics.read_text()):
            time.sleep(0.02)
        time.sleep(rng.uniform(0.0, 0.3))  # in the middle of a step, a save, a change of stage
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, 'it had ended before it was killed'
    run_to_end(tmp_path / 'killed', cache)

    expected, found = everything(tmp_path / 'undisturbed'), everything(tmp_path / 'killed')
    jax.tree.map(np.testing.assert_array_equal, found['items'], expected['items'])
    assert found['lines'] == expected['lines']
    assert compiled_steps(cache) == steps, 'a later run of the same experiment compiled a step again'


@pytest.mark.slow
def test_terminated_saves_exits_with_success_and_goes_on(tmp_path):
    cache = tmp_path / 'cache'
    process = start(tmp_path / 'run', cache)
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and '"step": 4' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert 'run the same command to go on' in output
    process = start(tmp_path / 'run', cache)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert 'resuming' in output
    steps = [line['step'] for line in read_metrics(tmp_path / 'run') if line['kind'] == 'train']
    assert steps == list(range(1, LAST_STEP + 1))
