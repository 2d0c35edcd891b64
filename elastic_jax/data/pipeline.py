"""From documents to batches, in one global order that no process count changes.

Each source is an endless stream of rows (`rows`), and the sources share the global order of rows by their weights (`mixture`).
Batch k holds the rows from k·B, of which each process makes its own. Any batch is found by arithmetic, so the position of a run
is one number, and Grain reads ahead in threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from elastic_jax.data.config import default_data_config
from elastic_jax.data.rows import Batch
from elastic_jax.data.stream import Stream, endless_stream, fingerprints, heldout_stream, load_stores, read_all
from elastic_jax.errors import UserError

__all__ = [
    'Batch',
    'BatchIterator',
    'Batches',
    'default_data_config',
    'fingerprints',
    'heldout_batches',
    'load_stores',
    'make_iterator',
    'read_all',
]

Ranges = Sequence[tuple[int, int]]
Beside = Callable[[int, np.ndarray], Batch]
ENDLESS = 2**40
BLOCK_TOKENS = 2**16


class Batches:
    """Batch k of an endless stream: this process's rows of it.

    `rows` are the (first, one past the last) ranges of rows that this process's devices hold; None for all. `beside` gives more
    arrays for a batch and its rows [R], such as a cached teacher's, up to batch `end`.
    """

    def __init__(
        self, stream: Stream, batch_size: int, rows: Ranges | None = None, beside: Beside | None = None, end: int = ENDLESS
    ):
        self.stream, self.batch_size, self.beside, self.end = stream, batch_size, beside, end
        ranges = ((0, batch_size),) if rows is None else rows
        self.rows = np.concatenate([np.arange(first, last) for first, last in ranges])

        self.per_block = max(1, BLOCK_TOKENS // (len(self.rows) * stream.context))

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`."""
        return self._with_more(index, self.stream.batch(index * self.batch_size + self.rows))

    def _with_more(self, index: int, batch: Batch) -> Batch:
        return batch if self.beside is None else batch | self.beside(index, self.rows)

    def block(self, index: int) -> list[Batch]:
        """Batches index · per_block and following, made at once: one by one, small ones cost more in calls than in tokens."""
        numbers = np.arange(index * self.per_block, min((index + 1) * self.per_block, self.end))
        block = self.stream.batch((numbers[:, None] * self.batch_size + self.rows).ravel())
        split = {key: np.split(value, len(numbers)) for key, value in block.items()}
        batches = [{key: parts[i] for key, parts in split.items()} for i in range(len(numbers))]
        return [self._with_more(int(number), batch) for number, batch in zip(numbers, batches, strict=True)]

    def identity(self) -> dict[str, Any]:
        """What a position in these batches is a position of."""
        stream = self.stream
        return {
            'fingerprint': stream.fingerprint,
            'batch_size': self.batch_size,
            'context': stream.context,
            'seed': stream.seed,
        }


class _Blocks(grain.sources.RandomAccessDataSource):
    """The blocks of batches, for Grain."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __len__(self) -> int:
        return -(-self.batches.end // self.batches.per_block)

    def __repr__(self) -> str:
        return f'Blocks({self.batches.identity()})'

    def __getitem__(self, index: int) -> list[Batch]:
        return self.batches.block(index)


class BatchIterator:
    """An endless stream of batches whose state is that of the last batch handed out."""

    def __init__(self, source: Batches, start_batch: int = 0):
        self.source = source
        self._start(start_batch)

    def _start(self, batch: int) -> None:
        self.next_batch = batch
        block, within = divmod(batch, self.source.per_block)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        blocks = grain.MapDataset.source(_Blocks(self.source))[block:].to_iter_dataset(options)
        self._iterator = itertools.islice(itertools.chain.from_iterable(blocks), within, None)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.next_batch += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """JSON-able: the next batch to hand out, and what it is a batch of. Holds for any process count."""
        return {'next_batch': self.next_batch, **self.source.identity()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state. Raises UserError when it belongs to other data."""
        own = self.source.identity()
        differ = [key for key in own if state.get(key) != own[key]]
        if differ:
            shown = ', '.join(f'{key}: {state.get(key)!r} saved, {own[key]!r} now' for key in differ)
            raise UserError(
                f'the saved data position belongs to other data ({shown}); restore the corpus and settings it was saved with'
            )
        self._start(int(state['next_batch']))


def make_iterator(
    config: ConfigDict,
    *,
    split: str,
    batch_size: int,
    context: int,
    seed: int,
    rows: Ranges | None = None,
    start_batch: int = 0,
    beside: Beside | None = None,
    end: int = ENDLESS,
) -> BatchIterator:
    """Batches of a split, without end by default: dicts of [rows, context] arrays as `rows.assemble` describes them.

    `rows` are the ranges of a batch's rows that this process makes (`parallel.placement`); None for all. `beside`, `end`: as of
    Batches.
    """
    source = Batches(endless_stream(config, split, context, seed), batch_size, rows, beside, end)
    return BatchIterator(source, start_batch)


def heldout_batches(config: ConfigDict, batch_size: int, context: int, max_batches: int | None = None) -> Iterator[Batch]:
    """The held-out split once, in a fixed order; its last batch is padded with rows that hold nothing."""
    stream = heldout_stream(config, context)
    count = -(-stream.mixture.period // batch_size)
    for index in range(count if max_batches is None else min(count, max_batches)):
        rows = np.arange(index * batch_size, min((index + 1) * batch_size, stream.mixture.period))
        batch = stream.batch_once(rows)
        missing = ((0, batch_size - len(rows)), (0, 0))
        yield {key: np.pad(value, missing) for key, value in batch.items()}
