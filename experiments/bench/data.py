"""How fast batches come, in tokens per second, however the data is made up; and how fast text becomes tokens.

  python experiments/bench/data.py [--seconds 4]

Target: at least 5 million tokens per second byte-level on two cores, so that data never holds up a step. The last column is the
share of the speed at which as many numbers are copied.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from ml_collections import ConfigDict

from elastic_jax.data.config import complete, default_data_config, stage_data
from elastic_jax.data.pipeline import load_stores, make_iterator

SHAPES = ((8, 256), (8, 1024), (16, 8192))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seconds', type=float, default=4.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chats = write_chats(Path(folder))
        plain = default_data_config()
        mixed = stage_data(plain, {'sources': {'chats': chats, 'code': {}}, 'weights': {'chats': 70, 'code': 30}})
        settings = {
            'one source, concatenated': plain,
            'one source, whole documents': stage_data(plain, {'packing': 'whole'}),
            'two sources 70/30, concatenated': mixed,
            'two sources 70/30, whole documents': stage_data(mixed, {'packing': 'whole'}),
            'two sources 70/30, whole, on disk': stage_data(mixed, {'packing': 'whole', 'cache': str(Path(folder) / 'cache')}),
        }
        print(f'{"reading and tokenising":<38}{"M tokens":>10}{"M tokens/s":>12}')
        write_tokenizer(Path(folder))
        reading = {
            'bytes, text': plain,
            'bytes, chats, answers scored': stage_data(plain, chats | {'heldout_fraction': 0.0}),
            'bytes, text, into the cache': stage_data(plain, {'cache': str(Path(folder) / 'first')}),
            'bytes, text, from the cache': stage_data(plain, {'cache': str(Path(folder) / 'first')}),
            'byte pairs (8192), text': complete({'tokenizer': folder}),
        }
        for name, config in reading.items():
            measure_reading(name, config)
        print(f'\n{"batches":<38}{"rows":>12}{"M tokens/s":>12}{"of a copy":>11}')
        for name, config in settings.items():
            for batch_size, context in SHAPES:
                measure_batches(name, config, batch_size, context, arguments.seconds)


def write_chats(folder: Path) -> dict[str, Any]:
    """Half a million short words in 5,000 chats; the source that reads them."""
    rng = np.random.default_rng(0)
    words = lambda n: ' '.join(map(str, rng.integers(0, 10_000, n)))
    turn = lambda: [{'role': 'user', 'content': words(20)}, {'role': 'assistant', 'content': words(80)}]
    (folder / 'chats.jsonl').write_text('\n'.join(json.dumps({'messages': turn()}) for _ in range(5_000)))
    return {'path': str(folder / 'chats.jsonl'), 'field': 'messages', 'loss': 'answers'}


def write_tokenizer(folder: Path) -> None:
    """A byte-pair tokenizer of 8192 tokens of the standard library's larger files."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192, special_tokens=['</s>'], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train(sorted(map(str, Path(sysconfig.get_paths()['stdlib']).glob('[a-d]*.py'))), trainer)
    tokenizer.save(str(folder / 'tokenizer.json'))


def measure_reading(name: str, config: ConfigDict) -> None:
    from elastic_jax.data import store

    store._load.cache_clear()
    begun = time.perf_counter()
    (found,) = load_stores(config, 'train').values()
    spent = time.perf_counter() - begun
    print(f'{name:<38}{len(found.tokens) / 1e6:10.2f}{len(found.tokens) / spent / 1e6:12.1f}', flush=True)


def measure_batches(name: str, config: ConfigDict, batch_size: int, context: int, seconds: float) -> None:
    batches = make_iterator(config, split='train', batch_size=batch_size, context=context, seed=0)
    next(batches)
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        last = next(batches)
        count += last['tokens'].size
    speed = count / (time.perf_counter() - begun)
    begun, copies = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.3:
        _ = {key: np.array(value) for key, value in last.items()}
        copies += last['tokens'].size
    copy_speed = copies / (time.perf_counter() - begun)
    print(f'{name:<38}{f"{batch_size} x {context}":>12}{speed / 1e6:12.1f}{speed / copy_speed:11.3f}', flush=True)


if __name__ == '__main__':
    main()
