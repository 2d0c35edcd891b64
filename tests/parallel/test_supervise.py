"""The parent of a host's processes: what it concludes from how they ended, and what it does with signals. No JAX in these."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic_jax.parallel.supervise import TWICE, _hear, _wait
from elastic_jax.parallel.verdict import Circumstances, Ending, lost_tasks, verdict

ROOT = Path(__file__).parents[2]
# As JAX 0.10.2 prints them.
LOST_TWO = """\
F1124 20:17:05.875137 8612 client.h:80] Terminating process because the JAX distributed service detected fatal errors. This most \
likely indicates that another task died; see the other task logs. absl::Status: UNAVAILABLE: The following tasks are unhealthy \
(stopped sending heartbeats):
1
12
The tasks have crashed. Check the task logs for an earlier error, or scheduler events (e.g. preemption, eviction) to debug.

RPC: /xla.coordination.CoordinationService/PollForError
"""
LOST_NAMED = LOST_TWO.replace('\n1\n12\n', '\n/job:jax_worker/replica:0/task:3\n')
NO_COORDINATOR = """\
F1124 20:17:58.766362 9173 client.h:80] Terminating process because the JAX distributed service detected fatal errors. \
absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded

RPC: /xla.coordination.CoordinationService/Heartbeat
"""
HOSTS = tuple(f'host-{n // 4}' for n in range(16))
ABOUT = Circumstances('launch it', 'host-0', 20, HOSTS)
ABORTED = -signal.SIGABRT


def test_lost_processes_are_read_from_what_jax_prints():
    assert lost_tasks(LOST_TWO) == [1, 12]
    assert lost_tasks(LOST_NAMED) == [3]
    assert lost_tasks(NO_COORDINATOR) == []


@pytest.mark.parametrize(
    ('endings', 'status', 'words'),
    [
        ([(0, 0, ''), (1, 0, '')], 0, []),
        ([(0, ABORTED, LOST_TWO), (2, ABORTED, LOST_TWO)], 1, ['process 1 of 16 (on host-0) and process 12 of 16 (on host-3)']),
        ([(0, ABORTED, LOST_NAMED)], 1, ['process 3 of 16 (on host-0) was lost: no sign of life for 20 s']),
        ([(5, ABORTED, NO_COORDINATOR)], 1, ['process 0 of 16 (on host-0), the coordinator, was lost or cannot be reached']),
        ([(0, ABORTED, LOST_TWO), (1, -signal.SIGKILL, '')], 1, ['process 1 of 16 (on host-0, pid 101)', 'killed by SIGKILL']),
        ([(0, ABORTED, LOST_TWO), (1, 1, '')], 1, ['process 1 of 16 (on host-0, pid 101) failed with exit status 1']),
        ([(0, 0, ''), (1, 139, '')], 1, ['exit status 139']),
        ([(0, ABORTED, 'corrupted double-linked list')], 1, ['process 0 of 16 (on host-0, pid 100) was lost: killed by SIGABRT']),
    ],
)  # fmt: skip
def test_one_sentence_says_who_was_lost_and_what_to_run(endings, status, words):
    found = verdict([Ending(n, 100 + n, code, stderr) for n, code, stderr in endings], ABOUT)
    assert found.status == status
    assert all(word in found.sentence for word in words)
    assert found.sentence.count('\n') == 0
    assert ('launch it' in found.sentence) == (status != 0)


def test_refused_input_is_said_by_the_process_alone():
    assert verdict([Ending(0, 1, 2), Ending(1, 2, 2)], ABOUT) == verdict([Ending(0, 1, 2)], ABOUT)
    found = verdict([Ending(0, 1, 2), Ending(1, 2, ABORTED, LOST_TWO)], ABOUT)
    assert (found.status, found.sentence) == (2, '')


def test_one_that_hangs_on_is_not_blamed():
    found = verdict([Ending(0, 7, -signal.SIGKILL, killed=True), Ending(1, 8, -signal.SIGSEGV)], ABOUT)
    assert 'process 1 of 16 (on host-0, pid 8) was lost: killed by SIGSEGV' in found.sentence
    assert 'process 0' not in found.sentence


def parent(*arguments, **environ):
    command = [sys.executable, '-m', 'elastic_jax.parallel.supervise', *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_every_process_gets_its_own_number_and_the_same_coordinator():
    show = 'echo $ELASTIC_PROCESS_ID/$ELASTIC_PROCESSES $ELASTIC_COORDINATOR $JAX_PLATFORMS $JAX_NUM_CPU_DEVICES; echo gone >&2'
    output, errors = parent('--processes=3', '--devices=4', '--port=4321', '--', 'sh', '-c', show).communicate(timeout=60)
    assert sorted(output.splitlines()) == [f'{n}/3 localhost:4321 cpu 4' for n in range(3)]
    assert sorted(errors.splitlines()) == ['[1] gone', '[2] gone', 'gone']


def test_a_dry_run_prints_commands_that_a_shell_runs():
    output, _ = parent('--processes=2', '--devices=1', '--dry-run', '--', 'sh', '-c', 'echo "$ELASTIC_PROCESS_ID"').communicate()
    ran = subprocess.run(['bash', '-c', output], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ['0', '1']


def test_sigterm_reaches_all_and_a_second_one_ends_what_does_not_listen():
    deaf = 'import signal, time; signal.signal(signal.SIGTERM, lambda *a: print("asked", flush=True)); print("up", flush=True)'
    process = parent('--processes=2', '--', sys.executable, '-c', f'{deaf}\nwhile True: time.sleep(0.1)')
    assert [process.stdout.readline() for _ in range(2)] == ['up\n'] * 2
    process.send_signal(signal.SIGTERM)
    assert [process.stdout.readline() for _ in range(2)] == ['asked\n'] * 2
    time.sleep(2 * TWICE)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and 'killed' in errors


class Deaf:
    """A child that only a kill ends."""

    killed = False
    popen = property(lambda self: self)

    def poll(self):
        return -signal.SIGKILL if self.killed else None

    def terminate(self):
        raise AssertionError('asked to stop')

    def kill(self):
        self.killed = True


def test_a_second_signal_kills_however_soon_it_comes_and_one_that_is_sent_twice_is_one():
    heard = []
    for now in (1.0, 1.0 + TWICE / 2):
        _hear(heard, now)
    assert heard == [1.0]
    _hear(heard, 1.0 + 2 * TWICE)
    child = Deaf()
    _wait([child], heard, grace=1)
    assert child.killed


def test_a_log_that_cannot_be_written_does_not_hold_the_run_up():
    talk = 'import sys; [print("x" * 60, file=sys.stderr) for _ in range(4000)]'
    command = [sys.executable, '-m', 'elastic_jax.parallel.supervise', '--', sys.executable, '-c', talk]
    with open('/dev/full', 'w') as full:
        assert subprocess.run(command, cwd=ROOT, stderr=full, timeout=60).returncode == 0


def test_those_that_go_on_after_one_was_lost_are_ended():
    die = 'if [ $ELASTIC_PROCESS_ID = 1 ]; then kill -9 $$; fi; exec sleep 1000'
    began = time.monotonic()
    command = ('--processes=2', '--', 'sh', '-c', die)
    _, errors = parent(*command, ELASTIC_HEARTBEAT_TIMEOUT='1', ELASTIC_RERUN='run this again').communicate(timeout=100)
    assert 'process 1' in errors and 'killed by SIGKILL' in errors and errors.endswith('run this again\n')
    assert time.monotonic() - began < 20


def test_children_do_not_outlive_their_parent():
    process = parent('--', 'sh', '-c', 'echo $$; exec sleep 1000')
    child = int(process.stdout.readline())
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while Path(f'/proc/{child}').exists() and ' Z ' not in Path(f'/proc/{child}/stat').read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_to_run_is_bad_usage():
    process = parent('--processes=2')
    assert 'give the command to run after --' in process.communicate(timeout=60)[1] and process.returncode == 2
    process = parent('--', '/no/such/program')
    assert 'cannot start /no/such/program' in process.communicate(timeout=60)[1] and process.returncode == 2
