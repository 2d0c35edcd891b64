"""The thread that steps an engine, and what an event loop hears of it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from elastic_jax.serve.engine import Engine, Job, Progress, Request

LOG = logging.getLogger('elastic_jax.serve')


class Runner:
    """Steps an engine in a thread of its own, from `start` to `stop`, after which it is closed.

    `broken` says that the thread ended by itself, as the engine could not begin anew after a failure.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.broken = False
        self._wake, self._stopping, self._when_broken = threading.Event(), False, lambda: None
        self._thread = threading.Thread(target=self._run, name='engine', daemon=True)

    def start(self, when_broken: Callable[[], None] = lambda: None) -> None:
        """Starts the thread, which calls `when_broken` should it be broken."""
        self._when_broken = when_broken
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; requests that are still there end as failed."""
        self._stopping = True
        self._wake.set()
        self._thread.join()

    def wake(self) -> None:
        self._wake.set()

    def _run(self) -> None:
        try:
            self._steps()
        except Exception:
            LOG.exception('the engine cannot begin anew; it stops')
            self.broken = True
        self.engine.close()
        if self.broken:
            self._when_broken()

    def _steps(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                worked = self.engine.step()
            except Exception:
                # Whatever went wrong with these requests, the next ones are served.
                LOG.exception('a step failed; the requests in it end')
                self.engine.fail()
                worked = True
            if not worked:
                # Waiting requests have deadlines even when nothing decodes.
                self._wake.wait(timeout=1.0 if self.engine.outstanding else None)


class Choices:
    """Several jobs of one request as an event loop sees them: the newest progress of each. Leaving it cancels what goes on.

    A reader that is slow skips what came in between and never makes anything wait or grow.
    """

    def __init__(self, runner: Runner, jobs: Sequence[Job]):
        self._runner, self._loop, self._changed = runner, asyncio.get_running_loop(), asyncio.Event()
        self.progress = [Progress() for _ in jobs]
        self._requests: list[Request] = []
        try:
            for index, job in enumerate(jobs):
                self._requests.append(runner.engine.submit(job, self._listener(index)))
        except Exception:
            self.close()
            raise
        runner.wake()

    def _listener(self, index: int):
        def heard(progress: Progress) -> None:
            self.progress[index] = progress
            self._changed.set()

        def listener(progress: Progress) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(heard, progress)

        return listener

    def close(self) -> None:
        """Cancels what has not ended."""
        for request in self._requests:
            self._runner.engine.cancel(request)
        self._runner.wake()

    async def changes(self) -> AsyncIterator[list[Progress]]:
        """The progress of all choices whenever one has changed; the last has all of them ended."""
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                now = list(self.progress)
                yield now
                if all(progress.finish for progress in now):
                    return
        finally:
            self.close()

    async def finished(self) -> list[Progress]:
        """The progress of all choices once they have ended."""
        async for now in self.changes():
            found = now
        return found
