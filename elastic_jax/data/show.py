"""What a config's data looks like: samples as the model sees them, counts of every source, how full rows are, and speed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from elastic_jax.data.config import SourceConfig, sources_of
from elastic_jax.data.pipeline import Batches, BatchIterator
from elastic_jax.data.rows import Batch
from elastic_jax.data.store import Corpus, TokenStore, load_corpus
from elastic_jax.data.stream import Stream, endless_stream, load_stores
from elastic_jax.data.tokenizers import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class StageData:
    """What one stage asks of the data: rows of `context` tokens, `batch_size` of them in each of `steps` steps."""

    name: str
    config: ConfigDict
    context: int
    batch_size: int
    steps: int
    seed: int


def describe(stages: Sequence[StageData], samples: int, tokens: int, seconds: float) -> dict[str, Any]:
    """The JSON object of `elastic data --json`.

    Args:
      samples: rows shown of the first stage; tokens: of each row at most. seconds: how long speed is measured, for each stage.
    Raises: UserError when a source cannot be read.
    """
    described: dict[str, Any] = {'sources': [], 'stages': [], 'samples': []}
    seen: set[SourceConfig] = set()
    for stage in stages:
        for split in ('train', 'heldout'):
            load_stores(stage.config, split)
        for source, _ in sources_of(stage.config):
            if source not in seen:
                seen.add(source)
                described['sources'].append(_source(source, load_corpus(source)))
        stream = endless_stream(stage.config, 'train', stage.context, stage.seed)
        described['stages'].append(_stage(stage, stream, seconds))
        if stage is stages[0]:
            tokenizer = load_tokenizer(stage.config.tokenizer)
            described['samples'] = _samples(stream, tokenizer, samples, tokens)
    return described


def _source(source: SourceConfig, corpus: Corpus) -> dict[str, Any]:
    splits = {split: _counts(store) for split, store in corpus.splits.items()}
    found = dataclasses.asdict(corpus.report)
    found.pop('limit')
    return {'name': source.name, 'path': source.path, 'loss': source.loss, **splits, **found}


def _counts(store: TokenStore) -> dict[str, Any]:
    scored = len(store.tokens) - store.documents if store.scored is None else _scored_targets(store)
    text_bytes = sum(
        int(store.bytes_of_token[part].sum()) for part in np.array_split(store.tokens, len(store.tokens) // 2**22 + 1)
    )
    longest = int(np.diff(store.starts).max()) if store.documents else 0
    counts = {'documents': store.documents, 'tokens': len(store.tokens), 'scored_tokens': int(scored), 'bytes': text_bytes}
    return counts | {'longest_document': longest}


def _scored_targets(store: TokenStore) -> int:
    """Tokens that are the target of another one and counted."""
    return int(np.count_nonzero(store.scored)) - int(np.count_nonzero(store.scored[store.starts[:-1]]))


def _stage(stage: StageData, stream: Stream, seconds: float) -> dict[str, Any]:
    batches = BatchIterator(Batches(stream, stage.batch_size))
    next(batches)  # packing and the first epochs' orders
    count, filled, scored, segments, begun = 0, 0, 0.0, 0, time.perf_counter()
    while count == 0 or time.perf_counter() - begun < seconds:
        batch = next(batches)
        count += 1
        filled += int(np.count_nonzero(batch['segment_ids']))
        scored += float(batch['loss_mask'].sum())
        segments += int(batch['segment_ids'].max(axis=1).sum())
    spent, places = time.perf_counter() - begun, count * stage.batch_size * stage.context
    rows = stage.steps * stage.batch_size
    shares = stream.mixture.counts / stream.mixture.period
    sources = [
        {'name': name, 'share': float(share), 'epochs': float(rows * share / own.per_epoch)}
        for name, own, share in zip(stream.names, stream.rows, shares, strict=True)
    ]
    return {
        'name': stage.name,
        'context': stage.context,
        'batch_size': stage.batch_size,
        'steps': stage.steps,
        'packing': stage.config.packing,
        'tokens': rows * stage.context,
        'fill': filled / places,
        'scored': scored / places,
        'segments_per_row': segments / (count * stage.batch_size),
        'tokens_per_second': places / spent,
        'sources': sources,
    }


def _samples(stream: Stream, tokenizer: Tokenizer, samples: int, tokens: int) -> list[dict[str, Any]]:
    """The first rows of the stream; with several sources, at least the first row of each, as far as `samples` goes."""
    if not samples:
        return []
    source, _ = stream.mixture.locate(np.arange(stream.mixture.period))
    first = sorted(np.unique(source, return_index=True)[1].tolist())
    rows = sorted((first + [row for row in range(samples) if row not in first])[:samples])
    batch = stream.batch(np.asarray(rows))
    names = [stream.names[s] for s in stream.mixture.locate(np.asarray(rows))[0]]
    return [
        {'row': row, 'source': name, 'segments': _segments(batch, i, tokenizer, tokens), 'places': stream.context}
        for i, (row, name) in enumerate(zip(rows, names, strict=True))
    ]


def _segments(batch: Batch, row: int, tokenizer: Tokenizer, tokens: int) -> list[dict[str, Any]]:
    """The segments of a row: number (0: padding), tokens, and of the first tokens stretches of text with or without loss.

    A token counts when the loss scores its prediction from the tokens before it, so the first of a row never does.
    """
    ids, segment_ids = batch['tokens'][row], batch['segment_ids'][row]
    counted = np.append(False, batch['loss_mask'][row][:-1] > 0)
    bounds = np.flatnonzero(np.diff(segment_ids, prepend=-1))
    segments = []
    for begin, end in zip(bounds, [*bounds[1:], len(ids)], strict=True):
        number, shown = int(segment_ids[begin]), min(int(end), tokens)
        stretches = []
        if number and begin < shown:
            changes = np.flatnonzero(np.diff(counted[begin:shown])) + 1
            for part, on in zip(np.split(ids[begin:shown], changes), counted[begin:shown][np.append(0, changes)], strict=True):
                stretches.append({'text': tokenizer.decode(part, special=True), 'loss': bool(on)})
        segments.append({'segment': number, 'tokens': int(end - begin), 'text': stretches})
    return segments


DIM, BOLD, PLAIN = '\x1b[2m', '\x1b[1m', '\x1b[0m'


def render(described: dict[str, Any], color: bool) -> str:
    """The same for reading. Text that the loss does not count is dim, or in ‹ › without colour."""
    off, on, bold, plain = (DIM, PLAIN, BOLD, PLAIN) if color else ('‹', '›', '', '')
    lines = []
    for sample in described['samples']:
        of = f' of {sample["source"]}' if sample['source'] else ''
        lines.append(f'{bold}row {sample["row"]}{of}{plain}')
        for segment in sample['segments']:
            what = f'segment {segment["segment"]}' if segment['segment'] else 'padding'
            lines.append(f'{bold}── {what}, {segment["tokens"]} tokens {"─" * 40}{plain}')
            if segment['text']:
                lines.append(''.join(part['text'] if part['loss'] else f'{off}{part["text"]}{on}' for part in segment['text']))
        lines.append('')
    if described['samples']:
        how = 'dim' if color else 'in ‹ ›'
        lines += [f'A line begins each segment; text {how} is not counted by the loss.', '']
    lines.append(f'{"source":<14}{"split":<9}{"documents":>11}{"tokens":>15}{"with loss":>15}{"bytes":>15}{"longest":>10}')
    for source in described['sources']:
        for split in ('train', 'heldout'):
            counts = source[split]
            values = [counts[key] for key in ('documents', 'tokens', 'scored_tokens', 'bytes', 'longest_document')]
            cells = ''.join(f'{value:>{width},}' for value, width in zip(values, (11, 15, 15, 15, 10), strict=True))
            lines.append(f'{source["name"] or "data":<14}{split:<9}{cells}')
    for source in described['sources']:
        lines += _findings(source)
    lines += [
        '',
        f'{"stage":<14}{"rows":>16}{"packing":>9}{"fill":>8}{"loss":>8}{"segments":>10}{"M tokens":>10}{"M tokens/s":>12}',
    ]
    for stage in described['stages']:
        rows = f'{stage["batch_size"]} x {stage["context"]}'
        lines.append(
            f'{stage["name"]:<14}{rows:>16}{stage["packing"]:>9}{stage["fill"]:>8.1%}{stage["scored"]:>8.1%}'
            f'{stage["segments_per_row"]:>10.1f}{stage["tokens"] / 1e6:>10.2f}{stage["tokens_per_second"] / 1e6:>12.1f}'
        )
        for source in stage['sources']:
            lines.append(f'  {source["name"] or "data":<14}{source["share"]:>8.2%} of the rows, {source["epochs"]:.2f} epochs')
    return '\n'.join(lines)


def _findings(source: dict[str, Any]) -> list[str]:
    kinds = {'bad_lines': 'damaged lines', 'empty_files': 'empty files', 'empty_documents': 'empty documents'}
    kinds['recoded_files'] = 'files in UTF-16'
    found = ', '.join(f'{source[key]} {word}' for key, word in kinds.items() if source[key])
    if not found:
        return []
    shown = [f'  {line}' for line in source['bad']]
    more = source['bad_lines'] - len(source['bad'])
    return [f'{source["name"] or "data"}: {found} in {source["files"]} files', *shown] + ([f'  and {more} more'] if more else [])
