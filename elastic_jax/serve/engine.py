"""Continuous batching over budgets: which request is in which slot of which size, step by step. Nothing here knows of HTTP.

A request waits in the queue of its size, is prefilled, decodes in a slot, and leaves it as soon as it has ended; if another size
answers than thinks, it goes from the one's slot to the head of the other's queue. `submit` and `cancel` may be called from any
thread; `step` from one. What listeners are told is the whole text so far, so that one who is late misses nothing.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from elastic_jax.errors import UserError, WorkError
from elastic_jax.infer.budget_control import Control, Thoughts, shown_thoughts, thoughts_of
from elastic_jax.infer.generate import GREEDY
from elastic_jax.infer.resident import Weights
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.sizes import Sizes
from elastic_jax.infer.text import complete, settled
from elastic_jax.serve.lane import Lane, Prefill


class Overloaded(WorkError):
    """The queue of a size is full."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the engine takes on.

    Attributes:
      slots: rows of each size that decode together. queue: requests of each size that may wait for a slot.
      context: tokens of a request, prompt and all that is drawn. seconds: that a request may take, waiting and all.
      piece: decoding steps between two looks at who joins and leaves. prefill: tokens that are fed in between.
    """

    slots: int = 4
    queue: int = 64
    context: int = 2048
    seconds: float = 300.0
    piece: int = 8
    prefill: int = 256

    def __post_init__(self) -> None:
        for name in ('slots', 'queue', 'context', 'seconds', 'piece', 'prefill'):
            if not getattr(self, name) > 0:
                raise UserError(f'{name}={getattr(self, name)} must be above 0')


DEFAULT = Limits()


@dataclasses.dataclass(frozen=True)
class Job:
    """What is asked for.

    Attributes:
      budget: the size that answers. think: the size that thinks first (None: nobody does), as `control` says.
      stop: strings before which the answer ends.
    """

    tokens: tuple[int, ...]
    budget: str
    max_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    seed: int = 0
    think: str | None = None
    control: Control | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """What there is of a request: texts that only ever grow.

    `finish` is empty while more may come; then 'stop', 'length', 'timeout', 'cancelled', or 'failed'.
    """

    thinking: str = ''
    text: str = ''
    thinking_tokens: int = 0
    tokens: int = 0
    finish: str = ''


Listener = Callable[[Progress], None]


@dataclasses.dataclass(eq=False)
class Request:
    """A job on its way. `held`: what its row holds before it draws; `gained`: what it has drawn since."""

    job: Job
    listener: Listener
    deadline: float
    lane: str
    held: list[int]
    thinking: bool
    gained: list[int] = dataclasses.field(default_factory=list)
    thoughts: Thoughts | None = None
    progress: Progress = Progress()
    cancelled: bool = False
    slot: int | None = None
    prefill: Prefill | None = None


class Engine:
    """Slots for every size of a checkpoint, and the queues before them."""

    def __init__(self, sizes: Sizes, limits: Limits = DEFAULT, clock: Callable[[], float] = time.monotonic):
        self.sizes, self.limits, self._clock = sizes, limits, clock
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(sizes.archs, 0)
        self._arrived: deque[Request] = deque()
        self._open_lanes()

    def _open_lanes(self) -> None:
        limits, eos_id = self.limits, self.sizes.tokenizer.eos_id
        self._queues: dict[str, deque[Request]] = {name: deque() for name in self.sizes.archs}
        self._rows: dict[str, list[Request | None]] = {name: [None] * limits.slots for name in self.sizes.archs}
        self._weights: dict[str, Weights] = {name: self.sizes.weights(name) for name in self.sizes.archs}
        self._lanes = {name: Lane(weights, limits.slots, limits.context, eos_id) for name, weights in self._weights.items()}

    def submit(self, job: Job, listener: Listener) -> Request:
        """Takes a job on, or raises Overloaded at once. `listener` is called by the thread that steps.

        Raises: UserError for a size that is not there, and for more tokens than a slot holds.
        """
        first = job.think or job.budget
        for name in (first, job.budget):
            self.sizes.weights(name)
        needed = len(job.tokens) + job.max_tokens
        if job.think:
            assert job.control is not None
            closing = self.sizes.tokenizer.encode(job.control.closing)
            needed += job.control.thinking_tokens + 2 * len(closing)
        if not job.tokens:
            raise UserError('the prompt is empty; give at least one character')
        if needed > self.limits.context:
            raise UserError(
                f'the prompt of {len(job.tokens)} tokens and what may be drawn make {needed} tokens, but a request may have '
                f'{self.limits.context}; shorten the prompt, or lower max_tokens or thinking_tokens'
            )
        deadline = self._clock() + self.limits.seconds
        request = Request(job, listener, deadline, first, list(job.tokens), job.think is not None)
        with self._lock:
            if self._counts[first] >= self.limits.slots + self.limits.queue:
                raise Overloaded(f'{first}: {self._counts[first]} requests are running or waiting already; try again later')
            self._counts[first] += 1
            self._arrived.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Frees what a request holds at the next step; nothing for one that has ended."""
        request.cancelled = True

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return sum(self._counts.values())

    def full(self) -> bool:
        """Whether every size would turn a request away."""
        return all(count >= self.limits.slots + self.limits.queue for count in self._counts.values())

    def report(self) -> dict[str, Any]:
        """Requests of each size that are running and waiting, and bytes in memory."""
        running = {name: sum(row is not None for row in rows) for name, rows in self._rows.items()}
        memory = {**self.sizes.memory(), 'caches_bytes': sum(lane.bytes for lane in self._lanes.values())}
        return {'running': running, 'outstanding': dict(self._counts), 'memory': memory}

    def step(self) -> bool:
        """Advances everything once: who joins, a little prefill, a piece of tokens. False when there was nothing to do."""
        with self._lock:
            arrived, self._arrived = self._arrived, deque()
        for request in arrived:
            self._queues[request.lane].append(request)
        self._sweep()
        worked = False
        for name in self._lanes:
            worked |= self._admit(name)
            worked |= self._decode(name)
        return worked

    def fail(self) -> None:
        """Ends all requests as failed and begins anew with empty slots."""
        with self._lock:
            arrived, self._arrived = self._arrived, deque()
        queued = [request for queue in self._queues.values() for request in queue]
        running = [request for rows in self._rows.values() for request in rows if request is not None]
        self._open_lanes()
        for request in (*arrived, *queued, *running):
            request.slot = None
            self._end(request, 'failed')

    def _sweep(self) -> None:
        """Lets go of requests that nobody waits for any more, or that took too long."""
        now = self._clock()
        reason = lambda request: 'cancelled' if request.cancelled else 'timeout' if now > request.deadline else ''
        for name, queue in self._queues.items():
            for request in [request for request in queue if reason(request)]:
                queue.remove(request)
                self._end(request, reason(request))
            for request in self._rows[name]:
                if request is not None and reason(request):
                    self._end(request, reason(request))

    def _admit(self, name: str) -> bool:
        """Gives free slots to who waits, and feeds at most `prefill` tokens of those that are not decoding yet."""
        lane, rows, weights = self._lanes[name], self._rows[name], self._weights[name]
        spent, worked = 0, False
        while spent < self.limits.prefill:
            request = next((row for row in rows if row is not None and row.prefill is not None), None)
            if request is None:
                if not self._queues[name] or None not in rows:
                    return worked
                request = self._queues[name].popleft()
                request.slot = rows.index(None)
                rows[request.slot] = request
                job, drawn = request.job, request.thoughts.drawn if request.thoughts else 0
                request.prefill = lane.begin(weights, request.held, job.sampling, job.seed, drawn)
            spent, worked = spent + lane.feed(weights, request.prefill), True
            if not request.prefill.rest:
                limit = request.job.control.thinking_tokens if request.thinking else request.job.max_tokens
                lane.join(request.slot, request.prefill, limit)
                request.prefill = None
        return worked

    def _decode(self, name: str) -> bool:
        lane, rows = self._lanes[name], self._rows[name]
        if not lane.active:
            return False
        gained = lane.piece(self._weights[name], self.limits.piece)
        for request, new in zip(rows, gained, strict=True):
            if request is not None and request.prefill is None:
                request.gained.extend(new)
                self._look(request)
        return True

    def _look(self, request: Request) -> None:
        """What a request's tokens have come to."""
        job, tokenizer = request.job, self.sizes.tokenizer
        if not request.thinking:
            done = complete(request.gained, tokenizer, job.stop, job.max_tokens)
            now = dataclasses.replace(request.progress, text=done.text, tokens=len(done.tokens))
            self._tell(request, now)
            if done.finish:
                self._end(request, done.finish)
            return
        thoughts = thoughts_of(request.gained, tokenizer, job.control)
        if not thoughts.closed:
            shown = settled(tokenizer.decode(thoughts.tokens), [job.control.closing])
            self._tell(request, Progress(shown, '', thoughts.drawn))
            return
        self._tell(request, Progress(shown_thoughts(thoughts.tokens, tokenizer, job.control.closing), '', thoughts.drawn))
        self._leave(request)
        request.lane, request.held = job.budget, [*job.tokens, *thoughts.tokens]
        request.thinking, request.thoughts, request.gained = False, thoughts, []
        self._queues[job.budget].appendleft(request)

    def _tell(self, request: Request, progress: Progress) -> None:
        if progress != request.progress:
            request.progress = progress
            request.listener(progress)

    def _leave(self, request: Request) -> None:
        if request.slot is not None:
            self._lanes[request.lane].leave(request.slot)
            self._rows[request.lane][request.slot] = None
            request.slot = request.prefill = None

    def _end(self, request: Request, finish: str) -> None:
        self._leave(request)
        with self._lock:
            self._counts[request.job.think or request.job.budget] -= 1
        self._tell(request, dataclasses.replace(request.progress, finish=finish))
