"""The parent of a run's processes on one host: starts them, hands signals on, and says which one was lost and what to run.

When one process of a run is lost, JAX ends the others from C++, where Python can say nothing; this parent can. It does without
JAX itself, so that it holds no device. `elastic train` puts itself under one where the environment tells of several processes.
All processes of a run on this host: `python -m elastic_jax.parallel.supervise --processes 2 --devices 4 -- elastic train …`.

SIGTERM and SIGINT let all processes save and stop; a second one kills them. Exit status: 0 when all have finished, or saved and
stopped; 2 when a process refused its input; else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from elastic_jax.errors import UserError
from elastic_jax.parallel.environment import heartbeat_timeout
from elastic_jax.parallel.verdict import Circumstances, Ending, Verdict, verdict

KEPT_LINES = 400
# Once one has ended badly, the others have so many heartbeat time-outs to stop by themselves.
GRACE = 2.5
TWICE = 0.01  # seconds within which two signals are meant as one
GLOO_CHATTER = b'[Gloo] Rank '  # its library's greeting, on stdout
PR_SET_PDEATHSIG = 1


class Child:
    """One supervised process. Its output passes through line by line; the end of its stderr is kept."""

    def __init__(self, process: int | None, command: Sequence[str], environ: Mapping[str, str], label: str = ''):
        self.process, self.killed = process, False
        self.kept: deque[str] = deque(maxlen=KEPT_LINES)
        try:
            # In a session of its own: Ctrl-C then reaches the parent alone, which hands it on as SIGTERM.
            self.popen = subprocess.Popen(
                command,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        except OSError as error:
            raise UserError(f'cannot start {command[0]}: {error.strerror}; give a command after --') from error
        self.readers = [
            threading.Thread(target=self._pass_on, args=arguments, daemon=True)
            for arguments in (
                (self.popen.stdout, sys.stdout.buffer, '', None),
                (self.popen.stderr, sys.stderr.buffer, label, self.kept),
            )
        ]
        for reader in self.readers:
            reader.start()

    def _pass_on(self, source: IO[bytes], target: IO[bytes], label: str, kept: deque[str] | None) -> None:
        writes = True
        for line in source:
            if line.startswith(GLOO_CHATTER):
                continue
            if kept is not None:
                kept.append(line.decode(errors='replace'))
            try:
                if writes:
                    target.write(label.encode() + line)
                    target.flush()
            except OSError:  # a full disk, a closed pipe; a process whose lines nobody reads would wait for ever
                writes = False

    def kill(self) -> None:
        self.killed = True
        self.popen.kill()

    def ending(self) -> Ending:
        for reader in self.readers:
            reader.join(5)  # a grandchild may hold the pipe open
        return Ending(self.process, self.popen.pid, self.popen.returncode, ''.join(self.kept), self.killed)


def _end_with_parent() -> None:
    """In the child: SIGTERM when the parent is gone. A run that nobody watches would hold its devices and its port."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def is_supervised(environ: Mapping[str, str]) -> bool:
    """Whether this process has such a parent."""
    return bool(environ.get('ELASTIC_ROSTER'))


def supervise(children: Sequence[tuple[int | None, Sequence[str], Mapping[str, str]]], rerun: str = '') -> int:
    """Runs (process number, command, what to add to the environment) each to its end; returns the exit status.

    When a process was lost, it says which one and to run `rerun` (default: $ELASTIC_RERUN, else the first command).
    """
    rerun = rerun or os.environ.get('ELASTIC_RERUN') or shlex.join(children[0][1])
    heartbeat = heartbeat_timeout(os.environ)
    signals: list[float] = []
    hear = lambda number, frame: _hear(signals, time.monotonic())
    before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    running: list[Child] = []
    with tempfile.TemporaryDirectory(prefix='elastic-') as roster:
        try:
            for process, command, environ in children:
                label = f'[{process}] ' if process else ''
                running.append(Child(process, command, {**os.environ, **environ, 'ELASTIC_ROSTER': roster}, label))
            _wait(running, signals, heartbeat * GRACE)
        finally:
            for child in running:
                if child.popen.poll() is None:
                    child.kill()
                    child.popen.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        result = _judge(running, Path(roster), rerun, heartbeat, bool(signals))
    if result.sentence:
        with contextlib.suppress(OSError):  # as of `_pass_on`: the status says it still
            print(f'elastic: {result.sentence}', file=sys.stderr, flush=True)
    return result.status


def _hear(signals: list[float], now: float) -> None:
    """Notes when a signal came; timeout(1) sends each twice, to its child and to the group that it is in."""
    if not signals or now - signals[-1] > TWICE:
        signals.append(now)


def _wait(running: Sequence[Child], signals: Sequence[float], grace: float) -> None:
    """Until all have ended. Hands the first signal on and kills at a second; also those that go on long after a bad ending."""
    handed_on, deadline = 0, None
    while any(child.popen.poll() is None for child in running):
        alive = [child for child in running if child.popen.poll() is None]
        if len(signals) > handed_on:
            for child in alive:
                child.popen.terminate() if len(signals) == 1 else child.kill()
            handed_on = len(signals)
        if deadline is None and any(child.popen.poll() for child in running):
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            for child in alive:
                child.kill()
        time.sleep(0.05)


def _judge(running: Sequence[Child], roster: Path, rerun: str, heartbeat: int, asked_to_stop: bool) -> Verdict:
    told = {int(path.stem): json.loads(path.read_text()) for path in roster.glob('*.json')}
    hosts = next((tuple(own['hosts']) for own in told.values()), ())
    endings = []
    for child in running:
        ending = child.ending()
        process = told.get(ending.pid, {}).get('process', ending.process)
        endings.append(Ending(process, ending.pid, ending.returncode, ending.stderr, ending.killed))
    about = Circumstances(rerun, socket.gethostname(), heartbeat, hosts if len(hosts) > 1 else (), asked_to_stop)
    return verdict(endings, about)


def local_environments(processes: int, devices: int | None, port: int) -> list[dict[str, str]]:
    """What each of several processes on this host gets in its environment; `devices`: virtual CPU devices of each."""
    own = {} if devices is None else {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)}
    if processes == 1:
        return [own]
    shared = {**own, 'ELASTIC_COORDINATOR': f'localhost:{port}', 'ELASTIC_PROCESSES': str(processes)}
    return [{**shared, 'ELASTIC_PROCESS_ID': str(process)} for process in range(processes)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog='python -m elastic_jax.parallel.supervise', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--processes', type=int, default=1, metavar='N', help='how many, all on this host (default: 1)')
    parser.add_argument('--devices', type=int, metavar='K', help='virtual CPU devices of each process')
    parser.add_argument('--port', type=int, help='of the coordinator, with --processes (default: a free one)')
    parser.add_argument('--dry-run', action='store_true', help='print the commands and run nothing')
    parser.add_argument('command', nargs=argparse.REMAINDER, metavar='-- COMMAND', help='such as: elastic train --config …')
    arguments = parser.parse_args(argv)
    command = arguments.command[1:] if arguments.command[:1] == ['--'] else arguments.command
    if not command:
        parser.error('give the command to run after --')
    if arguments.processes < 1 or (arguments.devices is not None and arguments.devices < 1):
        parser.error('--processes and --devices are 1 or more')
    own = local_environments(arguments.processes, arguments.devices, arguments.port or free_port())
    if arguments.dry_run:
        for environ in own:
            print(shlex.join([*(f'{key}={value}' for key, value in environ.items()), *command]))
        return 0
    children = [(process, command, environ) for process, environ in enumerate(own)]
    rerun = os.environ.get('ELASTIC_RERUN') or shlex.join(['python', '-m', 'elastic_jax.parallel.supervise', *argv])
    try:
        return supervise(children, rerun)
    except UserError as error:
        print(f'elastic: {error}', file=sys.stderr)
        return error.status


if __name__ == '__main__':
    sys.exit(main())
