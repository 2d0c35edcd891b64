"""Rows of one source: which pieces of which documents stand in row r, found by arithmetic from r alone.

A row of T tokens is a list of pieces, each a stretch of one document in the token store. `ConcatRows` lets documents stand end
to end and cuts the stream every T tokens; `PackedRows` fills every row with whole documents and pads what is left.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import numpy as np

from elastic_jax.data.packing import pack_pieces
from elastic_jax.data.store import TokenStore

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """Stretches of documents, in the order in which they fill their rows; all arrays are [pieces].

    Attributes:
      row: which of the asked-for rows the piece stands in, ascending.
      start: its first token in the store. length: its tokens. end: one past the last token of its document in the store.
    """

    row: np.ndarray
    start: np.ndarray
    length: np.ndarray
    end: np.ndarray


class Rows(Protocol):
    """The endless rows of one source; `per_epoch` rows hold every document once (rounded up)."""

    store: TokenStore
    per_epoch: int

    def pieces(self, rows: np.ndarray) -> Pieces: ...

    def once(self, rows: np.ndarray) -> Pieces: ...


class ConcatRows:
    """Documents of an epoch, shuffled by seed and epoch, end to end, epoch after epoch; row r is tokens r·T to (r + 1)·T."""

    def __init__(self, store: TokenStore, context: int, seed: int):
        self.store, self.context, self.seed = store, context, seed
        self.total = len(store.tokens)
        self.per_epoch = -(-self.total // context)
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in this epoch's order, where each begins in the epoch's stream)."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.store.documents)
        lengths = np.diff(self.store.starts)[order]
        return order, np.concatenate([[0], np.cumsum(lengths)])

    def pieces(self, rows: np.ndarray) -> Pieces:
        """The pieces of some rows, [n] ascending row numbers; all documents between the first and the last are looked at."""
        return self._pieces(rows, int(rows[-1] + 1) * self.context)

    def once(self, rows: np.ndarray) -> Pieces:
        """The same for rows of the first epoch, of which the last one ends with the documents."""
        return self._pieces(rows, min(int(rows[-1] + 1) * self.context, self.total))

    def _pieces(self, rows: np.ndarray, high: int) -> Pieces:
        row_begins = rows * self.context
        begins, starts, ends = self._documents(int(row_begins[0]), high)
        # A piece begins where a row does, and where a document begins inside one of the rows.
        row_of = np.searchsorted(row_begins, begins, side='right') - 1
        inside = begins - row_begins[row_of]
        own = (row_of >= 0) & (inside > 0) & (inside < self.context)
        bounds = np.concatenate([row_begins, begins[own]])
        row = np.concatenate([np.arange(len(rows)), row_of[own]])
        order = np.argsort(bounds, kind='stable')
        bounds, row = bounds[order], row[order]
        document = np.searchsorted(begins, bounds, side='right') - 1
        until = np.minimum(np.append(bounds[1:], high), row_begins[row] + self.context)
        return Pieces(row, starts[document] + bounds - begins[document], np.minimum(until, high) - bounds, ends[document])

    def _documents(self, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(place in the stream, first token and end in the store) of the documents that meet tokens low to high of the stream."""
        found = []
        for epoch in range(low // self.total, (high - 1) // self.total + 1):
            order, begins = self._order(epoch)
            inside = np.asarray([max(low - epoch * self.total, 0), min(high - epoch * self.total, self.total) - 1])
            first, last = np.searchsorted(begins, inside, side='right') - 1
            own = order[first : last + 1]
            found.append((begins[first : last + 1] + epoch * self.total, self.store.starts[own], self.store.starts[own + 1]))
        begins, starts, ends = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return begins, starts, ends


class PackedRows:
    """Whole documents in every row, packed once for the corpus; epochs differ in the order of the rows.

    A document longer than a row fills rows of its own, and its rest is packed like a document.
    """

    def __init__(self, store: TokenStore, context: int, seed: int):
        self.store, self.seed = store, seed
        self.packed = pack_pieces(np.asarray(store.starts), context)
        self.per_epoch = len(self.packed.row_starts) - 1
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.per_epoch)

    def pieces(self, rows: np.ndarray) -> Pieces:
        """The pieces of some rows, [n] ascending row numbers."""
        epochs, places = np.divmod(rows, self.per_epoch)
        chosen = np.asarray([self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)], np.int64)
        first, last = self.packed.row_starts[chosen], self.packed.row_starts[chosen + 1]
        pieces = np.repeat(first, last - first) + ramps(last - first)
        row = np.repeat(np.arange(len(rows)), last - first)
        return Pieces(row, self.packed.start[pieces], self.packed.length[pieces], self.packed.end[pieces])

    def once(self, rows: np.ndarray) -> Pieces:
        """The same: an epoch's rows end with its documents."""
        return self.pieces(rows)


def ramps(lengths: np.ndarray) -> np.ndarray:
    """0, 1, … for every length, end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def assemble(store: TokenStore, pieces: Pieces, rows: int, context: int) -> Batch:
    """Batch arrays [rows, T] of some pieces.

    `targets` are the next tokens of the same document, also where they stand in another row; the last token of a document has
    none. `loss_mask` is 1 where there is a target that the source scores. Segments are numbered from 1 and positions from 0 in
    every row, as a row cannot see the one before; places that hold no token have segment 0.
    """
    place = ramps(pieces.length)
    index = np.repeat(pieces.start, pieces.length) + place
    following = index + 1
    has_target = following < np.repeat(pieces.end, pieces.length)
    following = np.minimum(following, len(store.tokens) - 1)
    counted = has_target if store.scored is None else has_target & store.scored[following]
    piece_in_row = np.arange(len(pieces.row)) - np.searchsorted(pieces.row, pieces.row) + 1
    filled = np.bincount(pieces.row, pieces.length, minlength=rows).astype(np.int64)
    full = filled.sum() == rows * context
    where = None if full else np.repeat(np.arange(rows) * context, filled) + ramps(filled)

    def spread(values: np.ndarray, dtype: type) -> np.ndarray:
        if full:
            return values.astype(dtype, copy=False).reshape(rows, context)
        array = np.zeros(rows * context, dtype)
        array[where] = values
        return array.reshape(rows, context)

    targets = np.where(has_target, store.tokens[following], 0)
    return {
        'tokens': spread(store.tokens[index], np.int32),
        'targets': spread(targets, np.int32),
        'segment_ids': spread(np.repeat(piece_in_row, pieces.length), np.int32),
        'positions': spread(place, np.int32),
        'loss_mask': spread(counted, np.float32),
        'target_bytes': spread(store.bytes_of_token[targets] * counted, np.float32),
    }
