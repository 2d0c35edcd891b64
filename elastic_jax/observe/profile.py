"""A trace of some steps by JAX's profiler, in `WORKDIR/profile`, where TensorBoard's profile plugin and xprof read it."""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import AbstractContextManager, nullcontext

import jax
from etils import epath

from elastic_jax.observe.sinks import appendable


class ProfileWindow:
    """Traces `steps` steps from global step `start` (or from where a run resumes inside the window); 0 steps: never.

    The trace ends when the last of these steps has been computed, and is written by a thread of its own: meanwhile the steps
    after it are dispatched and computed as ever.
    """

    def __init__(self, start: int, steps: int, folder: epath.Path):
        self.start, self.end, self.folder = start, start + steps, folder
        self.tracing, self.writing, self.failure = False, None, None
        self.local = appendable(folder)
        self.temporary = None

    def step(self, step: int) -> AbstractContextManager:
        """Around the dispatch of the step after `step` steps."""
        if self.start <= step < self.end and not self.tracing and self.writing is None:
            self.temporary = None if self.local else tempfile.TemporaryDirectory()
            target = os.fspath(self.folder) if self.local else self.temporary.name
            jax.profiler.start_trace(target)
            self.tracing = True
        return jax.profiler.StepTraceAnnotation('train', step_num=step) if self.tracing else nullcontext()

    def computed(self, steps: int) -> None:
        """`steps` steps have been computed."""
        if self.tracing and steps >= self.end:
            self._stop()

    def close(self) -> None:
        """Ends a trace that is still running, and waits until it is written."""
        if self.tracing:
            self._stop()
        if self.writing is not None:
            self.writing.join()

    def _stop(self) -> None:
        self.tracing = False
        self.writing = threading.Thread(target=self._write, name='elastic-profile')
        self.writing.start()

    def _write(self) -> None:
        jax.profiler.stop_trace()
        if self.temporary is not None:
            _copy(epath.Path(self.temporary.name), self.folder)
            self.temporary.cleanup()


def _copy(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            (target / path.name).write_bytes(path.read_bytes())
