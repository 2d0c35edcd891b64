"""elastic inspect: what is inside a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys

from elastic_jax.verbs import flags

SUMMARY = 'Show the sizes inside a checkpoint: what they cost, how good they are, and the nested widths of every block.'
EXAMPLE = 'elastic inspect --checkpoint runs/quickstart'


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.checkpoint(parser)
    flags.json(parser)


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint

    checkpoint = open_checkpoint(arguments.checkpoint)
    if arguments.json:
        print(json.dumps(checkpoint.describe()))
        return 0
    from elastic_jax.evaluate.nesting import SHADES
    from elastic_jax.terminal import shows, shows_colour

    print(checkpoint.budgets)
    print()
    print(checkpoint.draw(colour=shows_colour(sys.stdout), ascii_only=not shows(SHADES, sys.stdout)))
    return 0
