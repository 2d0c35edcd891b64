"""elastic cache-teacher: the parent's top-k logits, written once for all budgets and later runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elastic_jax.terminal import json_text
from elastic_jax.verbs import flags
from elastic_jax.verbs.together import run_among_processes

if TYPE_CHECKING:
    from elastic_jax.data.teacher import TeacherCache

SUMMARY = "Write the parent's top-k logits for a config's stages, to train from with config.teacher='cached'; resumes by itself."
EXAMPLE = (
    'elastic cache-teacher --config experiments/elastic_from_hf.py:runs/parent,mid=0.7 --config.teacher_cache.path=runs/teacher'
)


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.config(parser)
    flags.json(parser)


def run(arguments: argparse.Namespace) -> int:
    def work(config: Any) -> None:
        from elastic_jax.parallel.processes import is_main
        from elastic_jax.train.teacher_cache import cache_teacher

        caches = cache_teacher(config, lambda line: print(line, file=sys.stderr, flush=True) if is_main() else None)
        if is_main():
            _print(caches, arguments.json)

    return run_among_processes(arguments, ['--json'] if arguments.json else [], work)


def _print(caches: Sequence[TeacherCache], as_json: bool) -> None:
    described = [
        {'folder': str(cache.folder), 'batches': cache.batches, 'bytes_per_token': cache.spec.bytes_per_token, 'k': cache.spec.k}
        for cache in caches
    ]
    if as_json:
        print(json_text({'caches': described}))
        return
    for own in described:
        print(f'{own["folder"]}: {own["batches"]} batches, top {own["k"]}, {own["bytes_per_token"]} bytes per token')
