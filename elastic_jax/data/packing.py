"""Which documents share a row: best fit, longest first, so that rows are nearly full and no document is cut that need not be."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Rows of whole pieces.

    Attributes:
      context: places in a row. row_starts: [rows + 1] where each row's pieces begin in the arrays below.
      start, length, end: [pieces] first token in the store, tokens, and one past the end of the piece's document.
    """

    context: int
    row_starts: np.ndarray
    start: np.ndarray
    length: np.ndarray
    end: np.ndarray


def pack_pieces(starts: np.ndarray, context: int) -> Packing:
    """Packs documents [starts[i], starts[i + 1]) into rows of `context` tokens; a longer one is cut into pieces first."""
    lengths = np.diff(starts)
    cuts = -(-lengths // context)
    document = np.repeat(np.arange(len(lengths)), cuts)
    within = (np.arange(len(document)) - np.repeat(np.cumsum(cuts) - cuts, cuts)) * context
    start, end = starts[:-1][document] + within, starts[1:][document]
    length = np.minimum(context, end - start)
    row = best_fit(length, context)
    order = np.argsort(row, kind='stable')
    row_starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=1))])
    return Packing(context, row_starts, start[order], length[order], end[order])


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of every piece, [pieces]: the longest first, each into the row it leaves the least room in.

    Every length is between 1 and `capacity`. `free` has bit c set where some row has exactly c places left, so that the
    tightest row is the lowest bit not below the piece's length.
    """
    row = np.empty(len(lengths), np.int64)
    order = np.argsort(-lengths, kind='stable')
    rows_with: dict[int, list[int]] = {}
    free, rows = 0, 0
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = free >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            there = rows_with[left]
            chosen = there.pop()
            if not there:
                free ^= 1 << left
        else:
            left, chosen, rows = capacity, rows, rows + 1
        row[piece] = chosen
        if left > length:
            there = rows_with.setdefault(left - length, [])
            if not there:
                free |= 1 << (left - length)
            there.append(chosen)
    return row
