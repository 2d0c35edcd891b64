"""Tokenised corpora: all tokens of a source end to end, in memory or memory-mapped from a cache folder."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from elastic_jax.data.cache import ArrayFiles, cached, source_key, stamps
from elastic_jax.data.chat import ChatTemplate, load_template
from elastic_jax.data.config import SourceConfig
from elastic_jax.data.report import Report
from elastic_jax.data.sources import Document, documents, is_heldout
from elastic_jax.data.tokenizers import Tokenizer, load_tokenizer

SPLITS = ('train', 'heldout')
BATCH_BYTES = 2**22  # of text tokenised at a time


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStore:
    """All tokens of one split of one source, end to end; every document closes with the end-of-text token.

    Attributes:
      tokens: [n] token ids. starts: [documents + 1] where each document begins. bytes_of_token: [vocab] bytes of text.
      fingerprint: hash of tokens, documents and `scored`; the same wherever the corpus lies and whether or not it is cached.
      scored: [n] whether the loss counts a token as a target; None: it counts all.
    """

    tokens: np.ndarray
    starts: np.ndarray
    bytes_of_token: np.ndarray
    fingerprint: str
    scored: np.ndarray | None = None

    @property
    def documents(self) -> int:
        return len(self.starts) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Both splits of one source, and what was found on reading it."""

    splits: dict[str, TokenStore]
    report: Report


def load_corpus(source: SourceConfig) -> Corpus:
    """Reads and tokenises a source; kept for the process's later stages, until a file of it changes.

    Raises: UserError when it cannot be read.
    """
    return _load(json.dumps(dataclasses.asdict(source), sort_keys=True), json.dumps(stamps(source), default=str))


@functools.lru_cache(maxsize=16)
def _load(settings: str, stamped: str) -> Corpus:
    source = SourceConfig(**json.loads(settings))
    tokenizer = load_tokenizer(source.tokenizer)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    bytes_of_token = tokenizer.byte_lengths().astype(np.float32)
    dtypes = {'tokens': dtype, 'starts': np.dtype(np.int64), 'scored': np.dtype(np.bool_)}
    template = load_template(source.chat_template, tokenizer)
    build = lambda files: _tokenise(source, tokenizer, template, files)
    if source.cache:
        key = source_key(source, tokenizer, template.text if template else '')
        files = cached(source.cache, key, SPLITS, dtypes, build)
    else:
        files = ArrayFiles.in_memory(SPLITS, dtypes)
        files.finish(build(files))
    splits = {}
    for split in SPLITS:
        arrays = files.arrays[split]
        scored = arrays['scored'] if len(arrays['scored']) else None
        splits[split] = TokenStore(arrays['tokens'], arrays['starts'], bytes_of_token, files.fingerprints[split], scored)
    return Corpus(splits, Report.from_json(files.facts))


def _tokenise(source: SourceConfig, tokenizer: Tokenizer, template: ChatTemplate | None, files: ArrayFiles) -> dict[str, Any]:
    """Writes both splits' arrays, and returns the report of reading as JSON."""
    report = Report(limit=source.max_bad_lines)
    totals = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        files.append(split, 'starts', np.zeros(1, np.int64))
    for batch, heldout in _batches(_split(documents(source, template, report), source.heldout_fraction)):
        encoded = _encode(batch, tokenizer, source.loss)
        for split in SPLITS:
            own = [pair for pair, held in zip(encoded, heldout, strict=True) if held == (split == 'heldout')]
            if own:
                ends = totals[split] + np.cumsum([len(ids) for ids, _ in own])
                totals[split] = int(ends[-1])
                files.append(split, 'starts', ends)
                files.append(split, 'tokens', np.concatenate([ids for ids, _ in own]))
                if source.loss == 'answers':
                    files.append(split, 'scored', np.concatenate([scored for _, scored in own]))
    return report.to_json()


def _encode(batch: list[Document], tokenizer: Tokenizer, loss: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(token ids, whether the loss counts each) of every document, closed with the end-of-text token.

    A chat whose template wrote that token at its end gets no second one. After a chat's last answer the token is part of it.
    """
    eos = np.asarray([tokenizer.eos_id], np.int32)
    if loss == 'all':
        return [
            (ids if document.answers is not None and tokenizer.eos_id in ids[-2:] else np.append(ids, eos), ids[:0])
            for document, ids in zip(batch, tokenizer.encode_many([document.content for document in batch]), strict=True)
        ]
    result = []
    for document in batch:
        ids, inside = tokenizer.encode_spans(document.content, document.answers)
        if tokenizer.eos_id not in ids[-2:]:
            ends_with_answer = not document.content.decode()[document.answers[-1][1] :].strip()
            ids, inside = np.append(ids, eos), np.append(inside, ends_with_answer)
        result.append((ids, inside))
    return result


def _split(found: Iterable[Document], fraction: float) -> Iterator[tuple[Document, bool]]:
    """(document, whether it is held out). Of a text that stands alone the end is held out, as neither split may be empty."""
    found = iter(found)
    first = list(itertools.islice(found, 2))
    if len(first) == 1 and 0 < fraction < 1 and first[0].answers is None:
        cut = _place_to_cut(first[0].content, fraction)
        if cut:
            yield first[0]._replace(content=first[0].content[:cut]), False
            yield first[0]._replace(content=first[0].content[cut:]), True
            return
    for document in itertools.chain(first, found):
        yield document, is_heldout(document.content, fraction)


def _place_to_cut(content: bytes, fraction: float) -> int:
    """Where the last `fraction` of a text begins: after a line, else after a word; 0 where one part would be blank."""
    at = min(int(len(content) * (1 - fraction)), len(content) - 1)
    cut = max(content.rfind(b'\n', 0, at), content.rfind(b' ', 0, at) if b'\n' not in content[:at] else -1) + 1
    return cut if content[:cut].strip() and content[cut:].strip() else 0


def _batches(found: Iterable[tuple[Document, bool]]) -> Iterator[tuple[list[Document], list[bool]]]:
    batch, heldout, size = [], [], 0
    for document, held in found:
        batch.append(document)
        heldout.append(held)
        size += len(document.content)
        if size >= BATCH_BYTES:
            yield batch, heldout
            batch, heldout, size = [], [], 0
    if batch:
        yield batch, heldout
