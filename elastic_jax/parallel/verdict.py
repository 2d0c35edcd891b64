"""Why the processes of a host ended: from their exit statuses and what JAX printed last, one sentence and one exit status."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ABORTED = -signal.SIGABRT
# What JAX's coordination service prints when it ends a process (JAX 0.10 to 0.12): the lost tasks follow line by line.
LOST = re.compile(r'tasks are unhealthy[^\n]*:\n((?:[^\n]*\d+\s*\n)+)')
TASK = re.compile(r'(\d+)\s*$', re.MULTILINE)
FATAL = 'JAX distributed service detected fatal errors'


@dataclass(frozen=True)
class Ending:
    """How one process of this host ended.

    Attributes:
      process: its number in the run, None where it never told. pid; returncode: as subprocess has it, negative for a signal.
      stderr: the end of what it printed. killed: by its parent, after it had not stopped by itself.
    """

    process: int | None
    pid: int
    returncode: int
    stderr: str = ''
    killed: bool = False


@dataclass(frozen=True)
class Circumstances:
    """What the parent knows besides.

    Attributes:
      hosts: host name of each process of the run; empty if unknown. here: this host's name. rerun: what goes on from the newest
      checkpoint. heartbeat: seconds. asked_to_stop: whether the parent was.
    """

    rerun: str
    here: str
    heartbeat: int
    hosts: Sequence[str] = ()
    asked_to_stop: bool = False

    def name(self, process: int | None, pid: int | None = None) -> str:
        """Such as 'process 3 of 8 (on host-b)'."""
        several = f' of {len(self.hosts)}' if self.hosts else ''
        host = self.hosts[process] if process is not None and process < len(self.hosts) else self.here if pid else ''
        where = ', '.join(filter(None, (f'on {host}' if host else '', f'pid {pid}' if pid else '')))
        number = 'the process' if process is None else f'process {process}{several}'
        return f'{number} ({where})' if where else number


@dataclass(frozen=True)
class Verdict:
    """The parent's exit status, and what it says ('' when all went well)."""

    status: int
    sentence: str = field(default='')


def lost_tasks(stderr: str) -> list[int]:
    """The numbers of the processes that JAX says have stopped sending heartbeats."""
    return sorted({int(number) for block in LOST.findall(stderr) for number in TASK.findall(block)})


def verdict(endings: Sequence[Ending], about: Circumstances) -> Verdict:
    """What became of a run, from how this host's processes ended.

    Exit status 0: all finished, or all saved and stopped; 2: one refused its input, and says so; else 1, also where another
    host's process was lost.
    """
    bad = [ending for ending in endings if ending.returncode != 0]
    if not bad:
        return Verdict(0)
    again = f'to go on from the newest checkpoint, run on every host: {about.rerun}'
    # Whoever JAX did not end because of another one is where it began.
    first = [ending for ending in bad if not ending.killed and not (ending.returncode == ABORTED and FATAL in ending.stderr)]
    refused = [ending for ending in first if ending.returncode == 2]
    if refused:
        return Verdict(2)
    if about.asked_to_stop and first and all(ending.returncode == -signal.SIGTERM for ending in first):
        return Verdict(128 + signal.SIGTERM, f'stopped before training had begun; {again}')
    if first:
        what = '; '.join(_ended(ending, about) for ending in first)
        return Verdict(1, f'{what}. The other processes of the run stop by themselves; {again}')
    lost = sorted({task for ending in bad for task in lost_tasks(ending.stderr)})
    if lost:
        names = ' and '.join(about.name(task) for task in lost)
        were = 'was' if len(lost) == 1 else 'were'
        return Verdict(1, f'{names} {were} lost: no sign of life for {about.heartbeat} s (see its own log); {again}')
    if any(FATAL in ending.stderr for ending in bad):
        return Verdict(
            1,
            f'{about.name(0)}, the coordinator, was lost or cannot be reached from {about.here} (see its own log, or the network '
            f'between them); {again}',
        )
    names = ' and '.join(about.name(ending.process, ending.pid) for ending in bad)
    return Verdict(1, f'{names} did not stop and was killed; {again}')


def _ended(ending: Ending, about: Circumstances) -> str:
    """How a process ended by its own."""
    name = about.name(ending.process, ending.pid)
    if ending.returncode >= 0:
        return f'{name} failed with exit status {ending.returncode}; what it said stands above'
    signal_name = _signal(-ending.returncode)
    memory = ' (the kernel does that when memory runs out)' if ending.returncode == -signal.SIGKILL else ''
    return f'{name} was lost: killed by {signal_name}{memory}'


def _signal(number: int) -> str:
    known: Mapping[int, str] = {member.value: member.name for member in signal.Signals}
    return known.get(number, f'signal {number}')
