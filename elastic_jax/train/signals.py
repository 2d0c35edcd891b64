"""Stopping when asked: SIGTERM and SIGINT let a run save first."""

from __future__ import annotations

import signal
from typing import Any, Protocol


class Stopped(Exception):
    """The run was asked to stop (SIGTERM or SIGINT), and has saved."""


class Stoppable(Protocol):
    stop_requested: bool


class StopOnSignal:
    """While open, SIGTERM and SIGINT ask the run to save and stop; a second one stops at once."""

    def __init__(self, run: Stoppable):
        self.run, self.old = run, {}

    def __enter__(self) -> None:
        def ask(number: int, frame: Any) -> None:
            if self.run.stop_requested:
                raise KeyboardInterrupt
            self.run.stop_requested = True

        for number in (signal.SIGTERM, signal.SIGINT):
            self.old[number] = signal.signal(number, ask)

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
