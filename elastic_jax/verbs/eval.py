"""elastic eval: how good every budget is."""

from __future__ import annotations

import argparse
import json

from elastic_jax.verbs import flags

SUMMARY = 'Held-out loss of every budget, in one load.'
EXAMPLE = 'elastic eval --checkpoint runs/quickstart --data notes.txt'


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.checkpoint(parser)
    parser.add_argument('--budgets', help='comma-separated (default: all)')
    parser.add_argument('--data', help="a text or JSONL file (default: the run's own held-out data)")
    parser.add_argument('--context', type=int, default=256, help='tokens per sequence')
    parser.add_argument('--batches', type=int, default=32, help='at most this many batches of 8 sequences')
    flags.json(parser)


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint

    checkpoint = open_checkpoint(arguments.checkpoint)
    budgets = arguments.budgets.split(',') if arguments.budgets else None
    scores = checkpoint.evaluate(budgets, data=arguments.data, context=arguments.context, batches=arguments.batches)
    if arguments.json:
        print(json.dumps({'budgets': [{'name': name, **score} for name, score in scores.items()]}))
    else:
        for name, score in scores.items():
            print(f'{name:12s} {score["bits_per_byte"]:.4f} bits per byte  {score["loss"]:.4f} nats per token')
    return 0
