"""elastic cache-teacher: the parent's top-k logits, written once for all budgets and later runs."""

from __future__ import annotations

import argparse
import json
import sys

from elastic_jax.verbs import flags

SUMMARY = "Write the parent's top-k logits for a config's stages, to train from with config.teacher='cached'; resumes by itself."
EXAMPLE = (
    'elastic cache-teacher --config experiments/elastic_from_hf.py:runs/parent,mid=0.7 --config.teacher_cache.path=runs/teacher'
)


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.config(parser)
    flags.json(parser)


def run(arguments: argparse.Namespace) -> int:
    from elastic_jax.config_file import load_config
    from elastic_jax.train.teacher_cache import cache_teacher

    config = load_config(arguments.config, arguments.overrides)
    caches = cache_teacher(config, lambda line: print(line, file=sys.stderr, flush=True))
    described = [
        {'folder': str(cache.folder), 'batches': cache.batches, 'bytes_per_token': cache.spec.bytes_per_token, 'k': cache.spec.k}
        for cache in caches
    ]
    if arguments.json:
        print(json.dumps({'caches': described}))
    else:
        for own in described:
            print(f'{own["folder"]}: {own["batches"]} batches, top {own["k"]}, {own["bytes_per_token"]} bytes per token')
    return 0
