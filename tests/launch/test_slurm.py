"""slurm.sbatch with stand-ins for srun and scontrol: what goes back into the queue."""

from pathlib import Path

import pytest

from elastic_jax.train import loop
from tests.launch.cloud import ROOT, Cloud

SAID = 'elastic: stopped at step 3 of 9, saved; run the same command to go on\n'


@pytest.mark.parametrize(
    ('said', 'code', 'restarts', 'requeued'),
    [
        ('done\n', 0, 0, False),
        (SAID, 0, 0, True),  # the time limit, or preemption
        ('elastic: process 3 was lost\n', 1, 0, True),
        ('killed\n', 137, 4, True),
        ('killed\n', 137, 10, False),
        ('elastic: unknown config key\n', 2, 0, False),
        ('srun: error: node-2: tasks 8-15: Exited with exit code 2\n', 143, 0, False),  # the others were killed
        ('srun: error: node-2: task 8: Exited with exit code 21\n', 143, 0, True),
    ],
)
def test_what_is_not_finished_goes_back_into_the_queue(said, code, restarts, requeued, tmp_path):
    cloud = Cloud(tmp_path)
    cloud.tell('srun.out', said)
    cloud.tell('srun.code', str(code))
    slurm = {'SLURM_JOB_ID': '42', 'SLURM_RESTART_COUNT': str(restarts), 'SLURM_SUBMIT_DIR': str(ROOT)}
    done = cloud.call('slurm.sbatch', '--', '--config', 'c.py', '--workdir', '/shared/run', **slurm)
    assert done.returncode == code, done.stderr
    assert said in done.stdout
    assert 'told to run: scontrol requeue 42\n' in done.stdout
    step, *rest = cloud.calls()
    assert step[-6:] == ['elastic_jax', 'train', '--config', 'c.py', '--workdir', '/shared/run']
    assert rest == ([['scontrol', 'requeue', '42']] if requeued else [])


def test_the_scripts_know_the_sentence_of_a_stopped_run():
    sentence = 'run the same command to go on'
    assert sentence in SAID
    assert sentence in Path(loop.__file__).read_text()
    for script in ('host.sh', 'slurm.sbatch'):
        assert sentence in (ROOT / 'launch' / script).read_text()
