"""elastic inspect: what is inside a checkpoint."""

from __future__ import annotations

import argparse
import sys

from elastic_jax.verbs import flags

SUMMARY = 'Show the sizes inside a checkpoint: what they cost, how good they are, and the nested widths of every block.'
EXAMPLE = 'elastic inspect --checkpoint runs/quickstart'


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.checkpoint(parser)
    flags.json(parser)


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint
    from elastic_jax.terminal import json_text, shows, shows_colour

    checkpoint = open_checkpoint(arguments.checkpoint)
    if arguments.json:
        print(json_text(checkpoint.describe()))
        return 0
    from elastic_jax.evaluate.nesting import SHADES

    print(checkpoint.budgets)
    print()
    print(checkpoint.draw(colour=shows_colour(sys.stdout), ascii_only=not shows(SHADES, sys.stdout)))
    return 0
