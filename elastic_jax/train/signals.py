"""Stopping when asked: SIGTERM and SIGINT let a run save first."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from elastic_jax.parallel.processes import are_several, asked_to_stop

# A signal that both the sender and a parent deliver counts once.
TWICE_WITHIN = 1.0


class Stopped(Exception):
    """The run was asked to stop (SIGTERM or SIGINT), and has saved."""


class StopOnSignal:
    """While open, SIGTERM and SIGINT ask the run to save and stop; another one, a second later or more, stops at once.

    Of several processes any one may be asked: JAX listens for SIGTERM and has all of them stop at the same step.
    """

    def __init__(self) -> None:
        self.asked, self.old = None, {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT,) if are_several() else (signal.SIGTERM, signal.SIGINT):
            self.old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def at(self, step: int) -> bool:
        """Whether to save and stop before this step; ask once for every step. The same answer on all processes."""
        return asked_to_stop(step) if are_several() else self.asked is not None

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
            if are_several():
                os.kill(os.getpid(), signal.SIGTERM)
        elif now - self.asked > TWICE_WITHIN:
            raise KeyboardInterrupt
