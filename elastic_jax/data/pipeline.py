"""From documents to batches, in one global order that no process count changes.

The documents of an epoch, shuffled by seed and epoch, stand end to end in one stream, epoch after epoch without end; row r of
T tokens covers the stream from r·T, and batch k the rows from k·B, of which each process takes its share. Any batch is found
by arithmetic, so the position of a run is one number, and Grain reads ahead in threads.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from ml_collections import ConfigDict

from elastic_jax.data.sources import documents, is_heldout
from elastic_jax.data.tokenizers import Tokenizer, load_tokenizer
from elastic_jax.errors import UserError

Batch = dict[str, np.ndarray]
Ranges = Sequence[tuple[int, int]]
ENDLESS = 2**40


def default_data_config() -> ConfigDict:
    """The keys of `config.data`."""
    return ConfigDict(
        {
            'path': '',  # a text or JSONL file, a folder, or a glob pattern; empty: the standard library's source
            'field': 'text',  # of a JSONL line
            'tokenizer': 'bytes',  # or a folder with tokenizer.json
            'heldout_fraction': 0.05,  # of the documents, chosen by their content
            'max_bad_lines': 0,
        }
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
    """All tokens of one split, end to end; every document closes with the end-of-text token.

    Attributes:
      tokens: [n] token ids. starts: [documents + 1] where each document begins. fingerprint: hash of what is in it and how.
    """

    tokens: np.ndarray
    starts: np.ndarray
    bytes_of_token: np.ndarray
    fingerprint: str

    @property
    def documents(self) -> int:
        return len(self.starts) - 1


def load_store(config: ConfigDict, split: str) -> TokenStore:
    """Tokenises one split ('train' or 'heldout') of the corpus; kept in memory for the process's later stages."""
    return _load_store(json.dumps(config.to_dict(), sort_keys=True), split)


@functools.lru_cache(maxsize=4)
def _load_store(config_json: str, split: str) -> TokenStore:
    if split not in ('train', 'heldout'):
        raise UserError(f'unknown split {split!r}; known: train, heldout')
    config = ConfigDict(json.loads(config_json))
    tokenizer = load_tokenizer(config.tokenizer)
    digest, pieces = hashlib.sha256(config_json.encode() + split.encode()), []
    for document in documents(config.path, config.field, config.max_bad_lines):
        if is_heldout(document.content, config.heldout_fraction) == (split == 'heldout'):
            digest.update(document.name.encode() + hashlib.sha256(document.content).digest())
            pieces.append(np.append(tokenizer.encode(document.content), np.int32(tokenizer.eos_id)))
    if not pieces:
        raise UserError(
            f'the {split} split has no documents at data.heldout_fraction={config.heldout_fraction}; '
            'add documents or change the fraction'
        )
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    return TokenStore(np.concatenate(pieces), starts, _bytes_of_token(tokenizer), digest.hexdigest()[:16])


def _bytes_of_token(tokenizer: Tokenizer) -> np.ndarray:
    return tokenizer.byte_lengths().astype(np.float32)


class PackedBatches(grain.sources.RandomAccessDataSource):
    """Batch k of the endless stream: this process's rows of it. Epochs differ in the order of their documents.

    `rows` are the (first, one past the last) ranges of rows that this process's devices hold; None for all.
    """

    def __init__(self, store: TokenStore, batch_size: int, context: int, seed: int, rows: Ranges | None = None):
        self.store, self.batch_size, self.context, self.seed = store, batch_size, context, seed
        self.rows = ((0, batch_size),) if rows is None else tuple(rows)
        self._order = functools.lru_cache(maxsize=4)(self._epoch_order)

    def __len__(self) -> int:
        return ENDLESS

    def __repr__(self) -> str:
        return f'PackedBatches({self.store.fingerprint}, {self.batch_size}x{self.context}, seed={self.seed})'

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in this epoch's order, where each begins in the epoch's stream)."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.store.documents)
        lengths = np.diff(self.store.starts)[order]
        return order, np.concatenate([[0], np.cumsum(lengths)])

    def __getitem__(self, index: int) -> Batch:
        parts = [self._range(index * self.batch_size + first, last - first) for first, last in self.rows]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if len(parts) > 1 else parts[0]

    def _range(self, first_row: int, rows: int) -> Batch:
        first = first_row * self.context
        tokens, document, place = self._look_up(np.arange(first, first + rows * self.context + 1))
        return make_batch(tokens, document, place, rows, self.store.bytes_of_token)

    def _look_up(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(token, number of its document in the stream, its place in the document) at consecutive stream offsets."""
        total = len(self.store.tokens)
        tokens, numbers, places = [], [], []
        for epoch in range(offsets[0] // total, offsets[-1] // total + 1):
            own = offsets[(offsets >= epoch * total) & (offsets < (epoch + 1) * total)] - epoch * total
            order, begins = self._order(int(epoch))
            low, high = np.searchsorted(begins, own[[0, -1]], side='right') - 1
            within = np.searchsorted(begins[low : high + 2], own, side='right') - 1 + low
            place = own - begins[within]
            tokens.append(self.store.tokens[self.store.starts[order[within]] + place])
            numbers.append(within + epoch * self.store.documents)
            places.append(place)
        return np.concatenate(tokens), np.concatenate(numbers), np.concatenate(places)


def make_batch(tokens: np.ndarray, document: np.ndarray, place: np.ndarray, rows: int, bytes_of_token: np.ndarray) -> Batch:
    """Batch arrays [rows, T] from rows·T + 1 consecutive stream tokens.

    `targets` are the next tokens of the same document; the last token of a document has none and is not scored. Segments are
    numbered from 1 and positions from 0 in every row, as a row cannot see the one before.
    """
    same = document[1:] == document[:-1]
    shape = (rows, (len(tokens) - 1) // rows)
    first_of_row = document[:-1].reshape(shape)[:, :1]
    segment_ids = (document[:-1].reshape(shape) - first_of_row + 1).astype(np.int32)
    columns = np.arange(shape[1], dtype=np.int32)
    positions = np.minimum(place[:-1].reshape(shape), columns).astype(np.int32)
    targets = np.where(same, tokens[1:], 0).astype(np.int32).reshape(shape)
    mask = same.astype(np.float32).reshape(shape)
    return {
        'tokens': tokens[:-1].astype(np.int32).reshape(shape),
        'targets': targets,
        'segment_ids': segment_ids,
        'positions': positions,
        'loss_mask': mask,
        'target_bytes': bytes_of_token[targets] * mask,
    }


class BatchIterator:
    """An endless stream of batches whose state is that of the last batch handed out."""

    def __init__(self, source: PackedBatches, start_batch: int = 0):
        self.source = source
        self._start(start_batch)

    def _start(self, batch: int) -> None:
        self.next_batch = batch
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        self._iterator = iter(grain.MapDataset.source(self.source)[batch:].to_iter_dataset(options))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self.next_batch += 1
        return batch

    def _identity(self) -> dict[str, Any]:
        source = self.source
        return {
            'fingerprint': source.store.fingerprint,
            'batch_size': source.batch_size,
            'context': source.context,
            'seed': source.seed,
        }

    def get_state(self) -> dict[str, Any]:
        """JSON-able: the next batch to hand out, and what it is a batch of. Holds for any process count."""
        return {'next_batch': self.next_batch, **self._identity()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state. Raises UserError when it belongs to other data."""
        own = self._identity()
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
) -> BatchIterator:
    """Batches of a split, without end: dicts of [rows, context] arrays as `make_batch` describes them.

    `rows` are the ranges of a batch's rows that this process makes (`parallel.placement`); None for all.
    """
    return BatchIterator(PackedBatches(load_store(config, split), batch_size, context, seed, rows), start_batch)


def heldout_batches(config: ConfigDict, batch_size: int, context: int, max_batches: int | None = None) -> Iterator[Batch]:
    """The held-out split once, in a fixed order; its last batch is padded with rows that are not scored."""
    store = load_store(config, 'heldout')
    source = PackedBatches(store, batch_size, context, seed=0)
    per_batch = batch_size * context
    count = -(-len(store.tokens) // per_batch)
    for index in range(count if max_batches is None else min(count, max_batches)):
        batch = source[index]
        beyond = (index * per_batch + np.arange(per_batch)).reshape(batch_size, context) >= len(store.tokens)
        for key in ('loss_mask', 'target_bytes'):
            batch[key] = np.where(beyond, 0, batch[key]).astype(np.float32)
        batch['segment_ids'] = np.where(beyond, 0, batch['segment_ids'])
        yield batch
