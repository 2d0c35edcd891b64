"""Runs of several real processes, and what may happen to them: nothing hangs, nothing is lost, and it is said what to do."""

import json
import os
import shutil
import signal
import time

import pytest

from elastic_jax.metrics import read_metrics
from tests.parallel.pods import Place, assert_same, place  # noqa: F401
from tests.parallel.small_experiment import LAST_STEP

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def undisturbed(place: Place):  # noqa: F811
    """The workdir of two processes that nothing happened to."""
    workdir = place.root / 'undisturbed'
    output = place.start(workdir).end()
    assert 'budget' in output and output.count('report:') == 1, 'only process 0 writes'
    assert 'parent *-:' in output and output.count('parent *-:') == 1
    return workdir


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())


def test_sigterm_to_one_lets_all_save_at_the_same_step_and_the_same_command_goes_on(place, undisturbed):  # noqa: F811
    workdir = place.root / 'asked'
    pod = place.start_paced(workdir)
    pod.until_step(workdir, 8)
    os.kill(pod.processes()[1], signal.SIGTERM)
    output = pod.end(0)
    assert 'run the same command to go on' in output
    manifests = [json.loads(path.read_text()) for path in (workdir / 'checkpoints').glob('*/manifest/metadata')]
    assert 8 <= max(manifest['step'] for manifest in manifests) < LAST_STEP
    assert 'resuming' in place.start(workdir).end()
    assert_same(workdir, undisturbed, LAST_STEP)


@pytest.mark.parametrize('victim', [1, 0])
def test_sigkill_to_one_stops_the_others_and_the_rerun_is_never_killed(place, undisturbed, victim):  # noqa: F811
    workdir = place.root / f'killed{victim}'
    pod = place.start_paced(workdir)
    pod.until_step(workdir, 10)
    began = time.monotonic()
    os.kill(pod.processes()[victim], signal.SIGKILL)
    output = pod.end(1)
    assert time.monotonic() - began < 60
    said = output.strip().splitlines()[-1]
    assert said.startswith(f'elastic: process {victim} of 2 (on ') and 'was lost: killed by SIGKILL' in said
    assert 'run on every host: python -m elastic_jax.parallel.supervise --processes=2' in said
    place.start(workdir).end()
    assert_same(workdir, undisturbed, LAST_STEP)


def test_sigkill_during_a_save_and_a_damaged_newest_checkpoint(place, undisturbed):  # noqa: F811
    """Killed while step 12 is written; then the newest complete one is damaged: the one before is used, and that is said."""
    workdir = place.root / 'saving'
    pod = place.start_paced(workdir)
    unfinished = lambda: [path for path in (workdir / 'checkpoints').glob('12*') if not path.name.isdigit()]
    pod.until(lambda: (workdir / 'checkpoints').exists() and unfinished(), 'save of step 12')
    os.kill(pod.processes()[1], signal.SIGKILL)
    pod.end(1)
    assert 12 not in checkpoints(workdir)
    newest = checkpoints(workdir)[-1]
    for how in ('truncated', 'deleted'):
        copy = shutil.copytree(workdir, place.root / how)
        parts = copy / 'checkpoints' / str(newest) / 'params'
        largest = max((path for path in parts.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:10]) if how == 'truncated' else largest.unlink()
        output = place.start(copy).end()
        assert f'checkpoint {newest} is damaged and passed over' in output
        assert f'at step {checkpoints(workdir)[-2]} of {LAST_STEP}' in output
        assert_same(copy, undisturbed, LAST_STEP)


# In one of two processes files may not grow any more once the checkpoint of step 9 is there, as on a full disk.
FULL_DISK = """
import os, resource, sys
from elastic_jax.checkpoint import manager
from elastic_jax.cli import main
save = manager.CheckpointManager.save
def full_after_nine(self, step, **items):
    if step == 12:
        self.manager.wait_until_finished()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    save(self, step, **items)
if os.environ['ELASTIC_PROCESS_ID'] == '1':
    manager.CheckpointManager.save = full_after_nine
main(sys.argv[1:])
"""


def test_a_full_disk_under_one_process_stops_all_with_the_last_checkpoint_intact(place, undisturbed):  # noqa: F811
    workdir = place.root / 'full'
    output = place.start(workdir, command=place.scripted(FULL_DISK, place.train(workdir))).end(1)
    assert 'the checkpoint of step 9 is intact' in output
    assert 'process 1 of 2' in output.strip().splitlines()[-1]
    assert checkpoints(workdir)[-1] == 9
    place.start(workdir).end()
    assert_same(workdir, undisturbed, LAST_STEP)


def test_steps_are_logged_once_and_in_order(undisturbed):
    assert [line['step'] for line in read_metrics(undisturbed) if line['kind'] == 'train'] == list(range(1, LAST_STEP + 1))
