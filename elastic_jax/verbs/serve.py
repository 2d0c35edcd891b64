"""elastic serve: an OpenAI-compatible HTTP endpoint that has every budget as a model."""

from __future__ import annotations

import argparse
import sys

from elastic_jax.errors import UserError
from elastic_jax.verbs import flags

SUMMARY = 'Serve every budget of a checkpoint over HTTP, as OpenAI serves models, from one set of weights.'
EXAMPLE = """elastic serve --checkpoint runs/quickstart --port 8000
  curl localhost:8000/v1/completions -H 'content-type: application/json' \\
    -d '{"model": "full", "think": "small", "thinking_tokens": 64, "prompt": "2+3=", "max_tokens": 16}'

GET /v1/models lists the budgets. POST /v1/completions and /v1/chat/completions take, beside OpenAI's fields: think (the budget
that thinks first), answer (the one that answers; default: model), thinking_tokens, opening, closing, switch (recompute or
hand-over), fill and entropy, as elastic generate has them; top_k, repetition_penalty.
Chats are rendered by the tokenizer's template, those of byte models as ChatML. GET /health tells what is running."""


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.checkpoint(parser)
    parser.add_argument('--host', default='127.0.0.1', help='where to listen (default: 127.0.0.1, this machine alone)')
    parser.add_argument('--port', type=int, default=8000, help='0: any that is free (default: 8000)')
    parser.add_argument('--budgets', help='comma-separated (default: all)')
    parser.add_argument('--dtype', choices=('bfloat16', 'float32'), default='float32')
    parser.add_argument(
        '--chat-template', default='', metavar='FILE', help="Jinja (default: the tokenizer's own; ChatML for bytes)"
    )
    parser.add_argument('--slice-bytes', type=int, metavar='N', help='limit of slices kept beside the largest size')
    limits = parser.add_argument_group('limits')
    limits.add_argument('--slots', type=int, default=4, help='requests of a size that decode together (default: 4)')
    limits.add_argument('--queue', type=int, default=64, help='requests of a size that may wait; more get 429 (default: 64)')
    limits.add_argument('--context', type=int, default=2048, help='tokens of a request, prompt and all (default: 2048)')
    limits.add_argument('--seconds', type=float, default=300, help='that a request may take (default: 300)')
    limits.add_argument('--body-bytes', type=int, default=2**20, help='of a request (default: 1 MiB)')


def run(arguments: argparse.Namespace) -> int:
    try:
        from elastic_jax.serve.server import listen, serve
    except ImportError as error:
        raise UserError(f"elastic serve needs {error.name}: pip install 'elastic_jax[serve]'") from error
    from elastic_jax.api import open_checkpoint
    from elastic_jax.serve.engine import Limits

    limits = Limits(arguments.slots, arguments.queue, arguments.context, arguments.seconds)
    if arguments.body_bytes < 1:
        raise UserError(f'--body-bytes={arguments.body_bytes} must be above 0')
    if not 0 <= arguments.port < 2**16:
        raise UserError(f'--port={arguments.port} must be from 0 to 65535')
    checkpoint = open_checkpoint(arguments.checkpoint)
    # Before weights are read, which may take long.
    with listen(arguments.host, arguments.port) as listening:
        budgets = arguments.budgets.split(',') if arguments.budgets else None
        sizes = checkpoint.load_sizes(budgets, limit_bytes=arguments.slice_bytes, dtype=arguments.dtype)
        said = lambda line: print(line, file=sys.stderr, flush=True)
        options = {'chat_template': arguments.chat_template, 'body_bytes': arguments.body_bytes, 'say': said}
        serve(sizes, {name: checkpoint.budgets[name] for name in sizes.archs}, limits, listening, **options)
    return 0
