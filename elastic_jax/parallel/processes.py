"""What the processes of a run settle among themselves. With one process all of it is immediate.

Every function but `is_main` and `are_several` is a collective: all processes call it, in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from elastic_jax.errors import UserError, WorkError

T = TypeVar('T')
TEXT_BYTES, SHOWN = 2048, 200


def is_main() -> bool:
    """Whether this is the process that writes logs, metrics and reports (number 0). It touches the devices."""
    return jax.process_index() == 0


def are_several() -> bool:
    return jax.process_count() > 1


def gather(own: str) -> list[str]:
    """The texts of all processes, by number; each cut to TEXT_BYTES."""
    if not are_several():
        return [own]
    text = np.zeros(TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(own.encode()[:TEXT_BYTES], np.uint8)
    text[: len(encoded)] = encoded
    return [bytes(row).rstrip(b'\0').decode(errors='replace') for row in multihost_utils.process_allgather(text)]


def all_agree(own: bool) -> bool:
    """Whether it is true on every process."""
    return own if not are_several() else bool(np.all(multihost_utils.process_allgather(np.asarray([own]))))


def together(work: Callable[[], T]) -> T:
    """`work()` on every process; where it fails on one, all of them raise what it said: none waits for another in vain.

    Raises: what `work` raised here; else UserError or WorkError with the number and the words of the first that failed.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    said = gather('' if failure is None else f'{getattr(failure, "status", 1)} {failure or type(failure).__name__}')
    if failure is not None:
        raise failure
    for process, text in enumerate(said):
        if text:
            status, _, sentence = text.partition(' ')
            raise (UserError if status == '2' else WorkError)(f'process {process}: {sentence}')
    return result


def check_same(facts: Mapping[str, str], advice: str) -> None:
    """Raises UserError, on all processes, naming the first of `facts` that one has otherwise than process 0."""
    if not are_several():
        return
    for name, own in facts.items():
        digest = hashlib.blake2b(own.encode(), digest_size=8).hexdigest()
        found = gather(f'{digest} {own if len(own) < SHOWN else ""}')
        for process, text in enumerate(found):
            if text != found[0]:
                shown = [part.partition(' ')[2] for part in (text, found[0])]
                values = f' ({shown[0]}, not {shown[1]})' if all(shown) else ''
                raise UserError(f'process {process} has another {name} than process 0{values}; {advice}')


def introduce(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The host names of all processes, by number; also written for the parent that asks for them (supervise.py)."""
    hosts = gather(socket.gethostname())
    if folder := environ.get('ELASTIC_ROSTER'):
        own = {'process': jax.process_index(), 'hosts': hosts}
        (Path(folder) / f'{os.getpid()}.json').write_text(json.dumps(own))
    return hosts


def asked_to_stop(step: int) -> bool:
    """Whether some process of several got SIGTERM: the same answer on all of them. Every process must ask at every step."""
    return multihost_utils.reached_preemption_sync_point(step)
