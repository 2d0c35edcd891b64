"""Batches made token by token in plain Python: what the arithmetic must give."""

import itertools

import numpy as np

from elastic_jax.data.store import TokenStore

EOS = 256
KEYS = ('tokens', 'targets', 'segment_ids', 'positions', 'loss_mask', 'target_bytes')


def make_store(lengths: list[int], scored: list[bool] | None = None, name: int = 0) -> TokenStore:
    """Documents of distinct tokens: a token's value tells source, document and place."""
    documents = [np.append(np.arange(n) + 1000 * i + 100_000 * name, EOS) for i, n in enumerate(lengths)]
    starts = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
    bytes_of_token = np.where(np.arange(10**6) == EOS, 0, 1 + np.arange(10**6) % 3).astype(np.float32)
    mask = None if scored is None else np.resize(np.asarray(scored), starts[-1])
    return TokenStore(np.concatenate(documents).astype(np.int32), starts, bytes_of_token, f'test{name}', mask)


def epoch(store: TokenStore, seed: int, number: int) -> list[list[int]]:
    """Store indices of every document's tokens, in the order of one epoch."""
    order = np.random.default_rng([seed, number]).permutation(store.documents)
    return [list(range(store.starts[i], store.starts[i + 1])) for i in order]


def concat_rows(store: TokenStore, context: int, seed: int, count: int) -> list[dict]:
    """The first rows of documents that stand end to end."""
    stream: list[tuple[int, int]] = []  # (number of the document in the stream, index in the store)
    for number in itertools.count():
        if len(stream) >= count * context:
            break
        for i, document in enumerate(epoch(store, seed, number)):
            stream += [(number * store.documents + i, index) for index in document]
    return [make_row(store, stream[r * context : (r + 1) * context], context) for r in range(count)]


def make_row(store: TokenStore, places: list[tuple[int, int]], context: int) -> dict:
    """A row of (document, index in the store), padded to `context`."""
    ends = {index for index in np.asarray(store.starts[1:]) - 1}
    row = {key: [] for key in KEYS}
    segment = position = 0
    for i, (document, index) in enumerate(places):
        fresh = i == 0 or document != places[i - 1][0]
        segment, position = (segment + 1, 0) if fresh else (segment, position + 1)
        last = index in ends
        target = 0 if last else int(store.tokens[index + 1])
        counted = not last and (store.scored is None or bool(store.scored[index + 1]))
        values = (int(store.tokens[index]), target, segment, position, float(counted), counted * store.bytes_of_token[target])
        for key, value in zip(KEYS, values, strict=True):
            row[key].append(value)
    return {key: values + [0] * (context - len(values)) for key, values in row.items()}


def assert_rows(batch: dict, rows: list[dict]) -> None:
    for key in KEYS:
        np.testing.assert_array_equal(batch[key], [row[key] for row in rows], err_msg=key)
