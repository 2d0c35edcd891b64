"""Verbs that all processes of a run start at once, each with the same command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any


def run_among_processes(arguments: argparse.Namespace, flags: Sequence[str], work: Callable[[Any], None]) -> int:
    """`work(config)` in this process alone, or joined with the others. Returns the exit status.

    `flags`: those of the command beside --config and its overrides.
    """
    from elastic_jax.parallel.environment import platform_of
    from elastic_jax.parallel.supervise import is_supervised, supervise

    if platform_of(os.environ) is not None and not is_supervised(os.environ):
        # One process of several: when JAX ends it because another was lost, its parent says so.
        same = [arguments.verb, f'--config={arguments.config}', *flags, *arguments.overrides]
        return supervise([(None, [sys.executable, '-m', 'elastic_jax', *same], {})])
    from elastic_jax.config_file import load_config
    from elastic_jax.parallel.distributed import among_processes
    from elastic_jax.parallel.processes import introduce, is_main, together

    with among_processes() as joined:
        if joined:
            hosts = introduce()
            if is_main():
                print(f'{len(hosts)} processes on {", ".join(dict.fromkeys(hosts))}', file=sys.stderr)
        load = lambda: load_config(arguments.config, arguments.overrides)
        # Alone, nothing of JAX is asked for before the config is read.
        work(together(load) if joined else load())
    return 0
