"""elastic import: a Hugging Face model becomes a checkpoint."""

from __future__ import annotations

import argparse
import sys

SUMMARY = 'Turn a Hugging Face model into a checkpoint with the budget full, for config.parent.checkpoint.'
EXAMPLE = 'elastic import --hf nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 --checkpoint runs/parent'


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--hf', required=True, metavar='DIR_OR_ID', help='a folder with safetensors files, or an id of the hub')
    parser.add_argument('--checkpoint', required=True, metavar='DIR', help='a workdir that holds no checkpoints yet')


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.cost import parameters
    from elastic_jax.hf.importing import import_checkpoint

    arch = import_checkpoint(arguments.hf, arguments.checkpoint)
    print(f'imported {parameters(arch):,.0f} parameters, {arch.pattern}, to {arguments.checkpoint}', file=sys.stderr)
    return 0
