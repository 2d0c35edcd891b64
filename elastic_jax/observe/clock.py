"""Where a process's time goes: every second belongs to exactly one part, so the parts sum to the time since the start."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import jax

PARTS = ('startup', 'compile', 'data', 'step', 'eval', 'save', 'other')
# Tracing, lowering and compiling; a function traced inside another reports both.
COMPILING = ('/jax/core/compile/jaxpr_trace_duration', '/jax/core/compile/jaxpr_to_mlir_module_duration',
             '/jax/core/compile/backend_compile_duration')  # fmt: skip


class Clock:
    """Seconds of this thread by part, from when the clock is made.

    `with clock.part('data'):` charges what happens inside; inner parts are taken out of outer ones. Until `ready` all else is
    `startup`, from then on `other`. What JAX spends on tracing and compiling is `compile`, wherever it happens. Close it.
    """

    def __init__(self) -> None:
        self.process_start = datetime.now(UTC).isoformat(timespec='seconds')
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.current, self.since = 'startup', time.perf_counter()
        self.thread, self.compiling = threading.get_ident(), []
        jax.monitoring.register_event_time_span_listener(self._compiled)

    def close(self) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._compiled)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charges the time inside to `name`."""
        before = self._charge(name)
        try:
            yield
        finally:
            self._charge(before)

    def ready(self) -> None:
        """Start-up is over."""
        self._charge('other')

    def goodput(self) -> dict[str, Any]:
        """`total` seconds so far, `seconds` by part, and `goodput`: the share of them spent in steps.

        `step` is dispatching steps and waiting for their results; waits for data count as `data` also while the device is still
        computing, so `goodput` is at least this much.
        """
        self._charge(self.current)
        total = sum(self.seconds.values())
        return {
            'process_start': self.process_start,
            'total': total,
            'seconds': dict(self.seconds),
            'goodput': self.seconds['step'] / total if total else 0.0,
        }

    def _charge(self, following: str) -> str:
        """Charges the time since the last call to the current part, and goes on with `following`; returns the part before."""
        now, before = time.perf_counter(), self.current
        compiling = min(now - self.since, sum(end - start for start, end in self.compiling))
        self.seconds['compile'] += compiling
        self.seconds[before] += now - self.since - compiling
        self.since, self.current, self.compiling = now, following, []
        return before

    def _compiled(self, event: str, start: float, end: float, **about: Any) -> None:
        """One span of compiling has ended; those inside it, which ended before, are part of it."""
        if event in COMPILING and threading.get_ident() == self.thread:
            while self.compiling and self.compiling[-1][0] >= start:
                self.compiling.pop()
            self.compiling.append((start, end))
