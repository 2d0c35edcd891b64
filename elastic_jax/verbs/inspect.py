"""elastic inspect: what is inside a checkpoint."""

from __future__ import annotations

import argparse
import json

from elastic_jax.verbs import flags

SUMMARY = 'Show the budgets of a checkpoint.'
EXAMPLE = 'elastic inspect --checkpoint runs/quickstart'


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.checkpoint(parser)
    flags.json(parser)


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.api import open_checkpoint

    checkpoint = open_checkpoint(arguments.checkpoint)
    print(json.dumps(checkpoint.describe()) if arguments.json else checkpoint.budgets)
    return 0
