"""How the processes of one run join, and how one of them leaves when it fails."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax

from elastic_jax.errors import UserError, WorkError
from elastic_jax.parallel.environment import Platform, heartbeat_timeout, initialization_timeout, platform_of


def initialize(environ: Mapping[str, str] = os.environ) -> bool:
    """Joins the other processes of this run, if the environment tells of any; returns whether it did. Call it before anything
    touches a device.

    Raises: WorkError where not all processes have joined within the time-out; UserError for a value that makes no sense.
    """
    if jax.distributed.is_initialized():
        return True
    platform = platform_of(environ)
    if platform is None:
        return False
    _join(platform, initialization_timeout(environ), heartbeat_timeout(environ))
    return True


def _join(platform: Platform, seconds: int, heartbeat: int) -> None:
    """JAX aborts the process in C++ when its own time-out ends, so that Python says nothing: it waits in a thread, for longer."""
    failures: list[BaseException] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                **platform.arguments, initialization_timeout=seconds + 60, heartbeat_timeout_seconds=heartbeat
            )
        except BaseException as error:  # what it raises belongs to the caller, whatever it is
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True, name='jax.distributed.initialize')
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise WorkError(_absent(platform, seconds))
    if failures:
        reason = ' '.join(str(failures[0]).split()) or type(failures[0]).__name__
        raise WorkError(f'could not join {platform.words}: {reason}') from failures[0]


def _absent(platform: Platform, seconds: int) -> str:
    """One sentence on what did not come."""
    again = 'start all processes again, or raise ELASTIC_INITIALIZATION_TIMEOUT if hosts start late'
    address = platform.arguments.get('coordinator_address')
    if address and platform.arguments['process_id'] != 0 and not _answers(str(address)):
        return (
            f'no coordinator at {address} after {seconds} s: check that process 0 runs there and that this host can reach the '
            f'port; then {again}'
        )
    return f'not all processes of {platform.words} joined within {seconds} s: look at the logs of the missing ones; then {again}'


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(':')
    try:
        socket.create_connection((host.strip('[]'), int(port)), timeout=3).close()
    except OSError:
        return False
    return True


@contextmanager
def among_processes(environ: Mapping[str, str] = os.environ) -> Iterator[bool]:
    """`initialize`, and for what is done inside: a process of several that fails ends at once.

    Python's own exit would wait for the other processes, which wait for this one. They lose its heartbeat and stop.
    """
    if platform_of(environ) is None:
        yield False
        return
    try:
        yield initialize(environ)
    except BaseException as error:
        _say(error)
        if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in str(error):
            # Most likely a collective with a process that is gone. The coordinator finds out which one, JAX prints that and
            # aborts this process; its parent (supervise.py) reads it.
            print('elastic: waiting for the coordinator to say whether a process was lost', file=sys.stderr, flush=True)
            time.sleep(2 * heartbeat_timeout(environ))
        sys.stdout.flush()
        os._exit(getattr(error, 'status', 1))


def _say(error: BaseException) -> None:
    if isinstance(error, UserError | WorkError):
        print(f'elastic: {error}', file=sys.stderr, flush=True)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()
