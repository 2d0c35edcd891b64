"""A disk that fills up while a checkpoint is saved: one sentence, and the checkpoint before is intact and resumable."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from elastic_jax.checkpoint.manager import CheckpointManager
from elastic_jax.checkpoint.restore import restore_slice
from tests.tiny import HYBRID, numpy_params

ROOT = Path(__file__).parents[2]

# The second save is larger than any file may become, as on a full disk. Which call says so is not fixed: saving goes on behind.
SAVE_TWICE = """
import resource, signal, sys
import numpy as np
from elastic_jax.checkpoint.manager import CheckpointManager
from elastic_jax.errors import WorkError
from tests.checkpoint.test_checkpoint import make_manifest
from tests.tiny import HYBRID, numpy_params
manager, params = CheckpointManager(sys.argv[1]), numpy_params(HYBRID)
save = lambda step, size: manager.save(
    step, params=params, opt_state={'mu': np.random.default_rng(0).normal(size=size)}, router={}, ordering={},
    data={}, manifest=make_manifest(step=step),
)
save(1, 10)
manager.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    save(2, 1_000_000)
    if sys.argv[2] == 'save':
        save(3, 10)
    else:
        manager.wait()
except WorkError as error:
    print('WorkError:', error)
"""


@pytest.mark.parametrize('surfaces_in', ['wait', 'save'])
def test_a_save_that_fails_behind_is_a_work_error_and_the_one_before_is_intact(tmp_path, surfaces_in):
    command = [sys.executable, '-c', SAVE_TWICE, str(tmp_path), surfaces_in]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith('WorkError: saving') and done.stdout.count('\n') == 1
    assert 'the checkpoint of step 1 is intact' in done.stdout
    manager = CheckpointManager(tmp_path)
    assert manager.latest() == 1
    manager.close()
    jax.tree.map(np.testing.assert_array_equal, restore_slice(tmp_path, HYBRID), numpy_params(HYBRID))


# Files may grow once the first checkpoint is there: what is larger than them all fails in the second.
TRAIN = """
import resource, sys
from elastic_jax.checkpoint import manager
from elastic_jax.cli import main
save = manager.CheckpointManager.save
def full_after_the_first(self, step, **items):
    save(self, step, **items)
    if step == 3 and sys.argv.pop() == 'full':
        self.manager.wait_until_finished()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
manager.CheckpointManager.save = full_after_the_first
main(sys.argv[1:-1])
"""


@pytest.mark.slow
def test_training_on_a_full_disk_stops_with_one_sentence_and_goes_on_when_there_is_space(tmp_path):
    arguments = [
        'train', '--config=tests/train/tiny_experiment.py:by_hand', f'--workdir={tmp_path / "run"}',
        f'--config.compilation_cache={tmp_path / "cache"}',
    ]  # fmt: skip
    environment = {**os.environ, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    run = lambda disk: subprocess.run(
        [sys.executable, '-c', TRAIN, *arguments, disk], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    stopped = run('full')
    assert stopped.returncode == 1, stopped.stderr[-3000:]
    assert 'Traceback' not in stopped.stderr
    assert 'the checkpoint of step 3 is intact' in stopped.stderr
    went_on = run('roomy')
    assert went_on.returncode == 0, went_on.stderr[-3000:]
    assert 'resuming' in went_on.stdout + went_on.stderr
