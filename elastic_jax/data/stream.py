"""One endless global order of rows over all sources of a data config; any row of it is found by arithmetic."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from elastic_jax.data.config import SourceConfig, complete, sources_of
from elastic_jax.data.mixture import Mixture, period_counts
from elastic_jax.data.rows import Batch, ConcatRows, PackedRows, Pieces, Rows, assemble
from elastic_jax.data.store import TokenStore, load_corpus
from elastic_jax.errors import UserError

ROWS = {'concat': ConcatRows, 'whole': PackedRows}


class Stream:
    """The rows of several sources in fixed shares.

    Attributes:
      names, rows: of each source. mixture: where row r comes from. context: tokens in a row.
      fingerprint: hash of the sources' tokens, their shares, and how rows are made of them.
    """

    def __init__(self, rows: dict[str, Rows], counts: Sequence[int], context: int, seed: int):
        self.names, self.rows, self.mixture = tuple(rows), tuple(rows.values()), Mixture(counts)
        self.context, self.seed = context, seed
        content = [(type(own).__name__, own.store.fingerprint) for own in self.rows] + [list(counts)]
        self.fingerprint = hashlib.blake2b(json.dumps(content, default=int).encode(), digest_size=8).hexdigest()

    def batch(self, numbers: np.ndarray) -> Batch:
        """Batch arrays [n, T], as `rows.assemble` describes them, of n rows of the stream, ascending."""
        return self._gather(numbers, lambda own, rows: own.pieces(rows))

    def batch_once(self, numbers: np.ndarray) -> Batch:
        """The same of rows of every source's first epoch, whose last row ends with its documents."""
        return self._gather(numbers, lambda own, rows: own.once(rows))

    def _gather(self, numbers: np.ndarray, pieces: Callable[[Rows, np.ndarray], Pieces]) -> Batch:
        source, rows = self.mixture.locate(numbers)
        parts: list[tuple[np.ndarray, Batch]] = []
        for s, own in enumerate(self.rows):
            places = np.flatnonzero(source == s)
            if len(places):
                part = assemble(own.store, pieces(own, rows[places]), len(places), self.context)
                if len(places) == len(numbers):
                    return part
                parts.append((places, part))
        batch = {}
        for key, value in parts[0][1].items():
            batch[key] = np.empty((len(numbers), self.context), value.dtype)
            for places, part in parts:
                batch[key][places] = part[key]
        return batch


def load_stores(config: ConfigDict, split: str) -> dict[str, TokenStore]:
    """Name -> one split ('train' or 'heldout') of every source of a data config that has a share of the rows.

    Raises: UserError when a source cannot be read or has nothing to train on, or there is nothing held out at all.
    """
    if split not in ('train', 'heldout'):
        raise UserError(f'unknown split {split!r}; known: train, heldout')
    stores, empty = {}, []
    for source, _ in sources_of(config):
        store = load_corpus(source).splits[split]
        if store.documents:
            stores[source.name] = store
        else:
            empty.append(source)
    if empty and (split == 'train' or not stores):
        alone = load_corpus(empty[0]).report.documents == 1
        advice = 'it is a single document, so split it into several files or JSONL lines' if alone else 'add documents'
        raise UserError(
            f'the {split} split of {_named(empty[0])} has no documents at data.heldout_fraction={empty[0].heldout_fraction}; '
            f'{advice}, or change the fraction'
        )
    return stores


def read_all(configs: Sequence[ConfigDict]) -> list[str]:
    """Reads both splits of all that some data configs name; returns a sentence for every source that has something passed over.

    Raises: UserError as `load_stores` does.
    """
    said = []
    for config in configs:
        for split in ('train', 'heldout'):
            load_stores(config, split)
        for source, _ in sources_of(config):
            summary = load_corpus(source).report.summary()
            sentence = f'{_named(source)}: {summary}'
            if summary and sentence not in said:
                said.append(sentence)
    return said


def fingerprints(configs: Sequence[ConfigDict]) -> list[str]:
    """Of all tokens to train on that some data configs name: the same on every host that reads the same corpora."""
    return [f'{name}:{store.fingerprint}' for config in configs for name, store in load_stores(config, 'train').items()]


def _named(source: SourceConfig) -> str:
    return f'source {source.name}' if source.name else source.path or "the standard library's source"


def endless_stream(config: ConfigDict, split: str, context: int, seed: int) -> Stream:
    """The endless stream of a split, in rows of `context` tokens."""
    config = complete(config)
    rows = {name: ROWS[config.packing](store, context, seed) for name, store in load_stores(config, split).items()}
    given = {source.name: weight for source, weight in sources_of(config)}
    weights = [own.per_epoch if given[name] is None else given[name] for name, own in rows.items()]
    return Stream(rows, period_counts(weights), context, seed)


def heldout_stream(config: ConfigDict, context: int) -> Stream:
    """The held-out split of all sources, spread evenly; one period holds every row once."""
    config = complete(config)
    rows = {name: ROWS[config.packing](store, context, 0) for name, store in load_stores(config, 'heldout').items()}
    return Stream(rows, [own.per_epoch for own in rows.values()], context, 0)
