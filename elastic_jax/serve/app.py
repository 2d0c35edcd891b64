"""The HTTP endpoint: OpenAI's completions, chat completions and models over an engine. Every budget is a model."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import anyio
import pydantic
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from elastic_jax.arch import unknown_name
from elastic_jax.checkpoint.manifest import Budget
from elastic_jax.data.chat import ChatTemplate
from elastic_jax.errors import UserError
from elastic_jax.infer.budget_control import closing_of
from elastic_jax.infer.text import encode_within
from elastic_jax.serve.engine import Closed, Job, Overloaded, Progress
from elastic_jax.serve.replies import DONE, Reply, error_object, event
from elastic_jax.serve.runner import Choices, Runner
from elastic_jax.serve.schema import ChatRequest, Common, CompletionRequest

Body = TypeVar('Body', bound=Common)
RETRY_SECONDS = 1


class Refused(Exception):
    """A request that gets an error object."""

    def __init__(self, status: int, message: str, kind: str = 'invalid_request_error', param: str | None = None, code: str = ''):
        super().__init__(message)
        self.status, self.body = status, error_object(message, kind, param, code or None)
        # OpenAI's client sends what timed out again, which would take as long again.
        self.headers = {'x-should-retry': 'false'} if status == 408 else {}


@dataclasses.dataclass(frozen=True)
class Service:
    """What the endpoint serves.

    Attributes:
      budgets: of the checkpoint, by name. template: renders chats; None when the tokenizer has none.
      turn_end: strings that end an answer in a chat. body_bytes: of a request, at most.
    """

    runner: Runner
    budgets: dict[str, Budget]
    template: ChatTemplate | None
    turn_end: tuple[str, ...] = ()
    body_bytes: int = 2**20
    created: int = 0

    @property
    def tokenizer(self) -> Any:
        return self.runner.engine.sizes.tokenizer

    def encode(self, prompt: str | list[int], opening: str = '') -> list[int]:
        """Tokens of a prompt that is text, or tokens already, and of what opens the thoughts after it."""
        if isinstance(prompt, str):
            # As one text, as `elastic generate` has it: a tokenizer may join the two, or begin every text with a space.
            return self.tokenizer.encode(prompt + opening).tolist()
        wrong = next((token for token in prompt if not 0 <= token < self.tokenizer.vocab_size), None)
        if wrong is not None:
            raise UserError(f'prompt: token {wrong} is not of the vocabulary of {self.tokenizer.vocab_size}')
        return [*prompt, *encode_within(opening, self.tokenizer)]

    def jobs(self, body: Common, prompts: list[Any], max_tokens: int, stop: tuple[str, ...]) -> list[Job]:
        """`body.n` jobs for every prompt, each with a seed of its own."""
        for field, name in (('model', body.model), ('answer', body.answer), ('think', body.think)):
            if name is not None and name not in self.budgets:
                raise Refused(404, unknown_name('model', name, list(self.budgets)), param=field, code='model_not_found')
        limits, wanted = self.runner.engine.limits, len(prompts) * body.n
        if wanted > limits.slots + limits.queue:
            # At no time would there be room for it: to try again later would not help.
            most = limits.slots + limits.queue
            raise UserError(f'{wanted} completions are asked for at once, but there is room for {most}; send fewer prompts or n')
        control, sampling = body.control(max_tokens), body.sampling
        opening = body.opening if control else ''
        seed = secrets.randbits(31) if body.seed is None else body.seed
        jobs = []
        for prompt in prompts:
            tokens = tuple(self.encode(prompt, opening))
            for _ in range(body.n):
                own = seed + len(jobs)
                jobs.append(Job(tokens, body.answers, max_tokens, sampling, stop, own, body.think, control))
        return jobs

    # The endpoints.

    async def models(self, request: Request) -> Response:
        return JSONResponse({'object': 'list', 'data': [self._model(name) for name in self.budgets]})

    async def model(self, request: Request) -> Response:
        name = request.path_params['name']
        if name not in self.budgets:
            raise Refused(404, unknown_name('model', name, list(self.budgets)), param='model', code='model_not_found')
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        costs = self.budgets[name].costs
        own = {key: costs[key] for key in ('parameters', 'active_parameters', 'bytes') if key in costs}
        return {'id': name, 'object': 'model', 'created': self.created, 'owned_by': 'elastic_jax', **own}

    async def health(self, request: Request) -> Response:
        if self.runner.engine.closed:
            return JSONResponse({'status': 'stopped'}, 503)
        return JSONResponse({'status': 'ok', **self.runner.engine.report()})

    async def completions(self, request: Request) -> Response:
        body = await self._read(request, CompletionRequest)
        return await self._answer(request, body, False, body.prompts, body.max_tokens, tuple(body.stop))

    async def chat(self, request: Request) -> Response:
        body = await self._read(request, ChatRequest)
        if self.template is None:
            raise UserError(
                'the tokenizer has no chat template; start elastic serve with --chat-template FILE, or use completions'
            )
        try:
            prompt = self.template.prompt([message.plain() for message in body.messages])
        except ValueError as error:
            raise UserError(f'messages: {error}') from error
        # Without a limit, an answer may be as long as there is room.
        thinks = body.think is not None
        room = self.runner.engine.limits.context - len(self.encode(prompt, body.opening if thinks else ''))
        if thinks:
            room -= closing_of(body.closing, self.tokenizer).room(body.thinking_tokens)
        return await self._answer(request, body, True, [prompt], body.limit(max(room, 1)), (*body.stop, *self.turn_end))

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        if self.runner.engine.full():
            raise Overloaded('every queue is full; try again later')
        raw, seconds = b'', self.runner.engine.limits.seconds
        try:
            with anyio.fail_after(seconds):
                async for part in request.stream():
                    raw += part
                    if len(raw) > self.body_bytes:
                        raise Refused(413, f'the request has more than {self.body_bytes} bytes; send a shorter one')
        except TimeoutError as error:
            message = f'the request was not there after {seconds:g} seconds; send it faster'
            raise Refused(408, message, 'timeout', code='timeout') from error
        try:
            return kind.model_validate_json(raw)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = '.'.join(str(part) for part in first['loc'])
            raise Refused(400, f'{where}: {first["msg"]}' if where else first['msg'], param=where or None) from error

    async def _answer(
        self, request: Request, body: Common, chat: bool, prompts: list[Any], max_tokens: int, stop: tuple[str, ...]
    ) -> Response:
        jobs = self.jobs(body, prompts, max_tokens, stop)
        reply = Reply.begin(chat, body.answers, sum(len(job.tokens) for job in jobs[:: body.n]))
        choices = Choices(self.runner, jobs)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return _Stream(reply, choices, usage)
        found = await _unless_gone(request, choices)
        for progress in found:
            if problem := _problem(progress):
                raise problem
        return JSONResponse(reply.whole(found))


def _problem(progress: Progress) -> Refused | None:
    if progress.finish == 'timeout':
        return Refused(408, 'the request took longer than the server allows; ask for fewer tokens', 'timeout', code='timeout')
    if progress.finish == 'failed':
        return Refused(500, 'the server failed at this request', 'server_error')
    return None


class _Stream(StreamingResponse):
    """Server-sent events of choices, which end with it: also when the client is gone before the first."""

    def __init__(self, reply: Reply, choices: Choices, usage: bool):
        super().__init__(_events(reply, choices, usage), media_type='text/event-stream')
        self._choices = choices

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._choices.close()


async def _events(reply: Reply, choices: Choices, usage: bool) -> AsyncIterator[bytes]:
    sent: list[Progress | None] = [None] * len(choices.progress)
    async with contextlib.aclosing(choices.changes()) as changes:
        async for now in changes:
            for index, progress in enumerate(now):
                if problem := _problem(progress):
                    yield event(problem.body)
                    return
                if progress != (sent[index] or Progress()):
                    yield event(reply.chunk(index, sent[index], progress))
                    sent[index] = progress
    if usage:
        yield event(reply.last(choices.progress))
    yield DONE


async def _unless_gone(request: Request, choices: Choices) -> list[Progress]:
    """The finished choices; when the client hangs up first, they are cancelled and ClientDisconnect is raised."""
    found: list[Progress] | None = None

    async def watch(scope: anyio.CancelScope) -> None:
        while (await request.receive())['type'] != 'http.disconnect':
            pass
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch, tasks.cancel_scope)
        try:
            found = await choices.finished()
        finally:
            choices.close()
        tasks.cancel_scope.cancel()
    if found is None:
        raise ClientDisconnect
    return found


def make_app(service: Service, when_broken: Callable[[], None] = lambda: None) -> Starlette:
    """The ASGI application; its lifespan is that of the engine's thread, which calls `when_broken` if it ends by itself."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.runner.start(when_broken)
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(service.runner.stop)

    def refused(request: Request, error: Any) -> Response:
        return JSONResponse(error.body, error.status, headers=error.headers)

    def bad(request: Request, error: Any) -> Response:
        return JSONResponse(error_object(str(error), 'invalid_request_error'), 400)

    def overloaded(request: Request, error: Any) -> Response:
        body = error_object(str(error), 'rate_limit_error', code='rate_limit_exceeded')
        return JSONResponse(body, 429, headers={'retry-after': str(RETRY_SECONDS)})

    def closed(request: Request, error: Any) -> Response:
        return JSONResponse(error_object(str(error), 'server_error'), 503)

    def no_such(request: Request, error: Any) -> Response:
        body = error_object(f'{request.method} {request.url.path}: {error.detail}', 'invalid_request_error')
        return JSONResponse(body, error.status_code, headers=error.headers)

    def failed(request: Request, error: Any) -> Response:
        return JSONResponse(error_object('the server failed at this request', 'server_error'), 500)

    return Starlette(
        routes=[
            Route('/v1/models', service.models),
            Route('/v1/models/{name:path}', service.model),
            Route('/v1/completions', service.completions, methods=['POST']),
            Route('/v1/chat/completions', service.chat, methods=['POST']),
            Route('/health', service.health),
        ],
        exception_handlers={
            Refused: refused,
            UserError: bad,
            Overloaded: overloaded,
            Closed: closed,
            ClientDisconnect: lambda request, error: Response(status_code=499),
            HTTPException: no_such,
            Exception: failed,
        },
        lifespan=lifespan,
    )
