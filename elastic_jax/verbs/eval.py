"""elastic eval: how good every size is."""

from __future__ import annotations

import argparse
from typing import Any

from elastic_jax.errors import UserError
from elastic_jax.terminal import json_text
from elastic_jax.verbs import flags

SUMMARY = 'Score any budgets and widths in one load: held-out text, multiple choice, exact match.'
EXAMPLE = """elastic eval --checkpoint runs/quickstart --data notes.txt --tasks sums.jsonl --widths embed=96 --widths mlp=192

tasks are JSONL: {"context": "2 + 3 =", "choices": [" 5", " 6"], "answer": 0} or {"prompt": "2 + 3 =", "answer": "5"}"""


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.checkpoint(parser)
    parser.add_argument('--budgets', help='comma-separated (default: all, or none where --widths are given)')
    parser.add_argument('--widths', action='append', default=[], help='a size such as embed=96,mlp=256; may be given again')
    parser.add_argument(
        '--data',
        action='append',
        metavar='FILE',
        help="text or JSONL; may be given again (default: the run's held-out data)",
    )
    parser.add_argument('--field', help="of --data's JSONL lines: a text, or a chat's messages (default: as the run has it)")
    parser.add_argument('--loss', help="what of --data's chats counts: all, or answers (default: as the run has it)")
    parser.add_argument('--tasks', action='append', default=[], metavar='FILE', help='JSONL questions; may be given again')
    parser.add_argument('--context', type=int, default=256, help='tokens per sequence')
    parser.add_argument('--batches', type=int, default=32, help='at most this many batches of 8 sequences')
    parser.add_argument('--limit', type=int, help='at most this many questions of each task')
    flags.json(parser)


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint
    from elastic_jax.arch import parse_widths

    for name in ('context', 'batches', 'limit'):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f'--{name} {value}: give at least 1')
    checkpoint = open_checkpoint(arguments.checkpoint)
    budgets = arguments.budgets.split(',') if arguments.budgets else [] if arguments.widths else None
    scores = checkpoint.evaluate(
        budgets,
        widths=[parse_widths(text) for text in arguments.widths],
        data=arguments.data if arguments.data and len(arguments.data) > 1 else (arguments.data or [None])[0],
        tasks=arguments.tasks,
        context=arguments.context,
        batches=arguments.batches,
        limit=arguments.limit,
        **{key: getattr(arguments, key) for key in ('field', 'loss') if getattr(arguments, key) is not None},
    )
    if arguments.json:
        print(json_text({'budgets': [{'name': name, **score} for name, score in scores.items()]}))
        return 0
    for name, score in scores.items():
        print(f'{name:12s} {_text(score)}')
        for text, own in score.get('data', {}).items():
            print(f'  {text}: {_text(own)}')
        for task, own in score.get('tasks', {}).items():
            print(f'  {task}: ' + '  '.join(f'{key} {value:.4g}' for key, value in own.items()))
    return 0


def _text(score: dict[str, Any]) -> str:
    return f'{score["bits_per_byte"]:.4f} bits per byte  {score["loss"]:.4f} nats per token'
