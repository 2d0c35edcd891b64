"""elastic slice: one size out of a checkpoint."""

from __future__ import annotations

import argparse
import sys

from elastic_jax.errors import UserError
from elastic_jax.verbs import flags

SUMMARY = 'Cut one size out of a checkpoint, reading only its bytes.'
EXAMPLE = 'elastic slice --checkpoint runs/quickstart --budget small --format hf --out out/small'


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.checkpoint(parser)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument('--budget', help='a budget of the checkpoint')
    size.add_argument('--widths', help='any widths that nest, such as embed=96,mlp=256,mlp@3=128; others stay full')
    parser.add_argument('--out', required=True, help='a folder that does not exist yet')
    parser.add_argument('--format', choices=('orbax', 'hf'), default='orbax')
    parser.add_argument('--dtype', choices=('bfloat16', 'float32'), help='dtype of the weights (default: as stored)')
    parser.add_argument('--push-to-hub', metavar='ID', help='also upload the folder to this model id (with --format hf)')


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint
    from elastic_jax.arch import parse_widths

    if arguments.push_to_hub and arguments.format != 'hf':
        raise UserError('--push-to-hub uploads a Hugging Face folder: add --format hf')
    checkpoint = open_checkpoint(arguments.checkpoint)
    widths = parse_widths(arguments.widths) if arguments.widths else None
    write = checkpoint.export if arguments.format == 'hf' else checkpoint.slice
    write(arguments.budget, arguments.out, widths=widths, dtype=arguments.dtype)
    print(f'wrote {arguments.out}', file=sys.stderr)
    if arguments.push_to_hub:
        from elastic_jax.hf.hub import push

        print(f'uploaded to {push(arguments.out, arguments.push_to_hub)}', file=sys.stderr)
    return 0
