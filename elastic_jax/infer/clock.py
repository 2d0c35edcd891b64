"""Wall time without compilation, which a server pays once and a measurement should not."""

from __future__ import annotations

import time
from typing import Any

import jax

_COMPILING = 0.0


def _listen(event: str, seconds: float, **_: Any) -> None:
    global _COMPILING
    if event.startswith('/jax/core/compile/'):
        _COMPILING += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)


class Clock:
    """Seconds since it was made (or since `lap`), less those in which JAX traced and compiled."""

    def __init__(self) -> None:
        self._begun = self._now()

    @staticmethod
    def _now() -> float:
        return time.perf_counter() - _COMPILING

    def seconds(self) -> float:
        return self._now() - self._begun

    def lap(self) -> float:
        """The seconds so far; begins anew."""
        seconds, self._begun = self.seconds(), self._now()
        return seconds
