"""local_multiprocess.sh: the same arguments reach every process, and it ends as they do."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'launch' / 'local_multiprocess.sh'
TRAIN = ('--', '--config', 'experiments/quickstart.py:smoke', '--workdir', 'runs/a b')


def call(*arguments, **environ):
    own = {**os.environ, 'PYTHONPATH': str(ROOT), **environ}
    return subprocess.run(['bash', SCRIPT, *arguments], capture_output=True, text=True, cwd=ROOT, env=own, timeout=120)


def test_help_is_the_header_and_nothing_at_all_is_a_mistake():
    assert 'usage: launch/local_multiprocess.sh' in call('--help').stdout
    assert call().returncode == 2


def test_a_dry_run_prints_the_command_of_every_process():
    done = call('--processes=3', '--devices=2', '--port=1234', '--python', sys.executable, '--dry-run', *TRAIN)
    assert done.returncode == 0, done.stderr
    for process, line in enumerate(done.stdout.splitlines()):
        words = shlex.split(line)
        environ = dict(word.split('=') for word in words[:5])
        assert environ == {
            'JAX_PLATFORMS': 'cpu',
            'JAX_NUM_CPU_DEVICES': '2',
            'ELASTIC_COORDINATOR': 'localhost:1234',
            'ELASTIC_PROCESSES': '3',
            'ELASTIC_PROCESS_ID': str(process),
        }
        assert words[5:] == [sys.executable, '-m', 'elastic_jax', 'train', *TRAIN[1:]]
    assert process == 2


def test_mistakes_are_one_sentence():
    done = call('--processes=2', '--workdir', 'x', *TRAIN)
    assert done.returncode == 2 and done.stderr.strip().startswith('local_multiprocess.sh: unknown option --workdir')
    assert 'the arguments of elastic train are missing' in call('--processes=2').stderr


def test_it_ends_as_its_processes_do_and_names_itself_as_what_to_run(tmp_path):
    stand_in = tmp_path / 'python'
    stand_in.write_text(
        f'#!/bin/sh\nif [ "$2" = elastic_jax.parallel.supervise ]; then exec {sys.executable} "$@"; fi\n'
        'if [ "$ELASTIC_PROCESS_ID" = 1 ]; then exit 1; fi\n'
    )
    stand_in.chmod(0o755)
    done = call('--python', str(stand_in), *TRAIN)
    assert done.returncode == 1
    assert 'process 1' in done.stderr and 'failed with exit status 1' in done.stderr
    assert done.stderr.strip().endswith(f"{SCRIPT} --python {stand_in} {' '.join(TRAIN[:4])} 'runs/a b'")
