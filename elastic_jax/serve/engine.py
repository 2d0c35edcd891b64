"""Continuous batching over budgets: which request is in which slot of which size, step by step. Nothing here knows of HTTP.

A request waits in the queue of its size, is prefilled, decodes in a slot, and leaves it as soon as it has ended; if another size
answers than thinks, it goes from the one's slot to the head of the other's queue, with its cache if that is handed over. `submit`
and `cancel` may be called from any thread; `step` from one. What listeners are told is the whole text so far, so that one who is
late misses nothing.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from elastic_jax.errors import UserError, WorkError
from elastic_jax.infer.budget_control import Closing, Control, Thoughts, closing_of, kept_of, shown_thoughts, thoughts_of
from elastic_jax.infer.generate import GREEDY
from elastic_jax.infer.handover import hand_over
from elastic_jax.infer.resident import Weights
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.sizes import Sizes
from elastic_jax.infer.text import Reader
from elastic_jax.serve.lane import Given, Lane, Prefill


class Overloaded(WorkError):
    """The queue of a size is full."""


class Closed(WorkError):
    """The engine runs no more."""


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
        if self.context < 2:
            raise UserError(f'context={self.context} must be at least 2: a token of the prompt and one that is drawn')


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

    @property
    def first(self) -> str:
        """The size that draws first, in whose queue it is counted until it has ended."""
        return self.budget if self.think is None else self.think


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
    """A job on its way.

    Attributes:
      lane: the size whose queue or slot it is in. held: what its row holds before it draws. gained: what it has drawn since.
      thinking: whether that is thoughts, which end with `closing`; `thoughts` are those so far. reader: of its answer.
      given: the cache that it brings to the next slot.
    """

    job: Job
    listener: Listener
    deadline: float
    lane: str
    held: list[int]
    closing: Closing | None
    thinking: bool
    gained: list[int] = dataclasses.field(default_factory=list)
    reader: Reader | None = None
    thoughts: Thoughts | None = None
    progress: Progress = Progress()
    cancelled: bool = False
    slot: int | None = None
    prefill: Prefill | None = None
    given: Given | None = None

    @property
    def hands_over(self) -> bool:
        """Whether its cache goes on to another slot when the thoughts are over, or the thinking size is unsure."""
        return self.thinking and self.job.control.switch == 'hand-over'

    @property
    def entropy(self) -> float | None:
        """Above which its thoughts go on to the answering size."""
        first = self.thinking and self.thoughts is None
        return self.job.control.entropy if first else None

    @property
    def limit(self) -> int:
        """How many tokens its row may draw."""
        if not self.thinking:
            return self.job.max_tokens
        return self.job.control.thinking_tokens - (self.thoughts.drawn if self.thoughts else 0)


class Engine:
    """Slots for every size of a checkpoint, and the queues before them."""

    def __init__(self, sizes: Sizes, limits: Limits = DEFAULT, clock: Callable[[], float] = time.monotonic):
        self.sizes, self.limits, self._clock = sizes, limits, clock
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(sizes.archs, 0)
        self._arrived: deque[Request] = deque()
        self.closed = False
        self._open_lanes()

    def _open_lanes(self) -> None:
        limits, stop_ids = self.limits, self.sizes.tokenizer.stop_ids
        self._queues: dict[str, deque[Request]] = {name: deque() for name in self.sizes.archs}
        self._rows: dict[str, list[Request | None]] = {name: [None] * limits.slots for name in self.sizes.archs}
        # Held as long as the engine: a slice that was let go of for another would stay in memory, uncounted.
        self._weights: dict[str, Weights] = {name: self.sizes.weights(name, self.sizes.archs) for name in self.sizes.archs}
        self._lanes = {name: Lane(weights, limits.slots, limits.context, stop_ids) for name, weights in self._weights.items()}

    def submit(self, job: Job, listener: Listener) -> Request:
        """Takes a job on, or raises Overloaded at once. `listener` is called by the thread that steps.

        Raises: UserError for a size that is not there, and for more tokens than a slot holds; Closed when it runs no more.
        """
        first, thinks = job.first, job.think is not None
        for name in (first, job.budget):
            self.sizes.arch(name)
        needed, closing = len(job.tokens) + job.max_tokens, None
        if thinks:
            assert job.control is not None
            closing = closing_of(job.control.closing, self.sizes.tokenizer)
            needed += closing.room(job.control.thinking_tokens)
        if not job.tokens:
            raise UserError('the prompt is empty; give at least one character')
        if needed > self.limits.context:
            raise UserError(
                f'the prompt of {len(job.tokens)} tokens and what may be drawn make {needed} tokens, but a request may have '
                f'{self.limits.context}; shorten the prompt, or lower max_tokens or thinking_tokens'
            )
        deadline = self._clock() + self.limits.seconds
        request = Request(job, listener, deadline, first, list(job.tokens), closing, thinks)
        with self._lock:
            if self.closed:
                raise Closed('the server has stopped and takes on no more requests; start it again')
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
        self._end_all()
        self._open_lanes()

    def close(self) -> None:
        """Ends all requests as failed, and takes on no more."""
        with self._lock:
            self.closed = True
        self._end_all()

    def _end_all(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, deque()
        queued = [request for queue in self._queues.values() for request in queue]
        running = [request for rows in self._rows.values() for request in rows if request is not None]
        # Let go of before there are new ones: memory need not hold the caches of both. Others may be reading the old lists.
        self._lanes, self._queues, self._rows = {}, {}, {}
        for request in (*arrived, *queued, *running):
            request.slot = request.prefill = request.given = None
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
                request = self._next(name) if None in rows else None
                if request is None:
                    return worked
                request.slot = rows.index(None)
                rows[request.slot] = request
                job, drawn = request.job, request.thoughts.drawn if request.thoughts else 0
                own = (request.entropy, request.hands_over, request.given)
                request.prefill = lane.begin(weights, request.held, job.sampling, job.seed, drawn, *own)
                request.given = None
            spent, worked = spent + lane.feed(weights, request.prefill), True
            if not request.prefill.rest:
                lane.join(request.slot, request.prefill, request.limit)
                request.prefill = None
        return worked

    def _next(self, name: str) -> Request | None:
        """The first of a queue that may have a slot, taken from it.

        Caches that were handed over and wait for a slot take memory that nobody planned for: while there are as many as slots, no
        row begins that would make one more. Rows in slots never wait for others, so these caches get slots in time.
        """
        for request in self._queues[name]:
            waiting = sum(other.given is not None for other in self._queues[request.job.budget])
            if not request.hands_over or request.given is not None or waiting < self.limits.slots:
                self._queues[name].remove(request)
                return request
        return None

    def _decode(self, name: str) -> bool:
        lane, rows = self._lanes[name], self._rows[name]
        if not lane.active:
            return False
        gained, unsure = lane.piece(self._weights[name], self.limits.piece)
        for request, new, waits in zip(rows, gained, unsure, strict=True):
            if request is not None and request.prefill is None:
                self._look(request, new, waits)
        return True

    def _look(self, request: Request, new: list[int], waits: bool) -> None:
        """What a request's tokens have come to with these; `waits`: its size is unsure of the next one."""
        job, tokenizer, closing = request.job, self.sizes.tokenizer, request.closing
        if not request.thinking:
            request.reader = request.reader or Reader(tokenizer, job.stop, job.max_tokens, request.held)
            done = request.reader.read(new)
            now = dataclasses.replace(request.progress, text=done.text, tokens=len(done.tokens))
            self._tell(request, now)
            if done.finish:
                self._end(request, done.finish)
            return
        request.gained.extend(new)
        row = [*request.held, *request.gained]
        thoughts = thoughts_of(job.tokens, row[len(job.tokens) :], tokenizer, job.control.thinking_tokens, closing)
        self._tell(request, Progress(shown_thoughts(job.tokens, thoughts, tokenizer, closing), '', thoughts.drawn))
        if thoughts.closed or waits:
            self._switch(request, row, thoughts)

    def _switch(self, request: Request, row: list[int], thoughts: Thoughts) -> None:
        """Sends a request from its slot, whose row holds these tokens, to the answering size: to answer, or to think on."""
        job, held = request.job, [*request.job.tokens, *thoughts.tokens]
        if request.hands_over:
            count, giver, taker = kept_of(row, held), self._weights[request.lane], self._weights[job.budget]
            cache = self._lanes[request.lane].take(giver, request.slot, held[:count])
            places = self._lanes[job.budget].places
            request.given = Given(hand_over(cache, giver.arch, taker, places, job.control.fill), count)
        self._leave(request)
        request.lane, request.held, request.gained = job.budget, held, []
        request.thinking, request.thoughts = not thoughts.closed, thoughts
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
            self._counts[request.job.first] -= 1
        self._tell(request, dataclasses.replace(request.progress, finish=finish))
