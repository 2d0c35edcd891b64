"""A server process: the endpoint on a socket, until it is asked to stop."""

from __future__ import annotations

import errno
import itertools
import socket
import time
from collections.abc import Callable, Mapping

import uvicorn

from elastic_jax.checkpoint.manifest import Budget
from elastic_jax.data.chat import load_template
from elastic_jax.errors import UserError, WorkError
from elastic_jax.infer.budget_control import Control, closing_of
from elastic_jax.infer.handover import FILLS
from elastic_jax.infer.sizes import Sizes
from elastic_jax.serve.app import Service, make_app
from elastic_jax.serve.engine import Engine, Job, Limits
from elastic_jax.serve.runner import Runner

# What ends a turn in ChatML, which a byte model writes as text; other tokenizers' end of text ends it.
BYTE_TURN_END = ('<|im_end|>',)
SHUTDOWN_SECONDS = 10


def make_service(
    sizes: Sizes, budgets: Mapping[str, Budget], limits: Limits, chat_template: str = '', body_bytes: int = 2**20
) -> Service:
    """What a server of these sizes serves. Raises UserError for a damaged chat template."""
    template = load_template(chat_template, sizes.tokenizer)
    turn_end = BYTE_TURN_END if sizes.tokenizer.spec.get('kind') == 'bytes' and not chat_template else ()
    runner = Runner(Engine(sizes, limits))
    return Service(runner, dict(budgets), template, turn_end, body_bytes, int(time.time()))


def warm(engine: Engine) -> None:
    """Compiles all that will be needed, before anyone waits for it."""

    def run(job: Job) -> None:
        # One by one: the queues may be shorter than what is to be compiled.
        engine.submit(job, lambda progress: None)
        while engine.step():
            pass

    for name in engine.sizes.archs:
        for length in (250, 60, 10):
            run(Job((0,) * min(length, engine.limits.context - 1), name, 1))
    room = min(10, engine.limits.context - 1 - closing_of(' ', engine.sizes.tokenizer).room(1))
    names = engine.sizes.archs if room > 0 else ()
    for think, answer, fill in itertools.product(names, names, FILLS):
        control = Control(1, 1, closing=' ', switch='hand-over', fill=fill)
        run(Job((0,) * room, answer, 1, think=think, control=control))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises: UserError for a host that is not this machine, WorkError for a port not to be had."""
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f'--host={host} is no address of this machine ({error.strerror}); give another --host') from error
        raise WorkError(f'cannot listen on {host}:{port} ({error.strerror}); give another --port') from error


def serve(
    sizes: Sizes,
    budgets: Mapping[str, Budget],
    limits: Limits,
    listening: socket.socket,
    chat_template: str = '',
    body_bytes: int = 2**20,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Serves until SIGINT or SIGTERM: then no more are taken on, and those that are running get SHUTDOWN_SECONDS to end.

    Raises: WorkError when the engine has failed and cannot begin anew.
    """
    service = make_service(sizes, budgets, limits, chat_template, body_bytes)
    say(f'compiling for {", ".join(sizes.archs)}')
    warm(service.runner.engine)
    memory = service.runner.engine.report()['memory']
    parts = ', '.join(f'{memory[f"{part}_bytes"] / 2**20:.1f} MiB of {part}' for part in ('resident', 'slices', 'caches'))
    host, port, *_ = listening.getsockname()
    say(f'serving on http://{f"[{host}]" if ":" in host else host}:{port}/v1 ({parts})')
    stop = lambda: setattr(server, 'should_exit', True)
    config = uvicorn.Config(
        make_app(service, stop), log_level='warning', timeout_graceful_shutdown=SHUTDOWN_SECONDS, timeout_keep_alive=30
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listening])
    if service.runner.broken:
        raise WorkError('the server stopped, as it could not make room anew after a failure (above); start it again')
