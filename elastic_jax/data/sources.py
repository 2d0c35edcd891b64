"""Corpora: named documents from the standard library, text files or JSONL, split by content into train and held-out."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from elastic_jax.errors import UserError

TEXT_SUFFIXES = ('.txt', '.md', '.py', '.rst', '.text')


class Document(NamedTuple):
    """One document: where it came from, and its bytes."""

    name: str
    content: bytes


def documents(path: str, field: str, max_bad_lines: int) -> Iterator[Document]:
    """Every document of a corpus, in a fixed order.

    Args:
      path: a text or JSONL file, a folder of them, or a glob pattern, at any path that epath can open; empty for the Python
        standard library's own source.
      field: the field of a JSONL line that holds the text.
      max_bad_lines: how many damaged JSONL lines are passed over before that is an error.
    Raises: UserError naming the path (and line) when there is nothing to read.
    """
    yield from _files(path, field, max_bad_lines) if path else _stdlib()


def _stdlib() -> Iterator[Document]:
    """The standard library's .py files, read as bytes (a few are not UTF-8), without any tests."""
    root = Path(sysconfig.get_paths()['stdlib'])
    for path in sorted(root.rglob('*.py')):
        parts = path.relative_to(root).parts
        folders, name = parts[:-1], parts[-1]
        skipped = {'site-packages', 'dist-packages', '__pycache__', '_bundled', 'turtledemo'}
        if any(part in skipped or 'test' in part for part in folders) or name.startswith('test') or name.endswith('_test.py'):
            continue
        content = path.read_bytes()
        if content.strip():
            yield Document('/'.join(parts), content)


def _files(pattern: str, field: str, max_bad_lines: int) -> Iterator[Document]:
    paths = list(_expand(pattern))
    if not paths:
        raise UserError(f'data.path {pattern} matches no file; give an existing text or JSONL file, a folder, or a glob pattern')
    bad: list[str] = []
    found = False
    for path in paths:
        try:
            if str(path).endswith(('.jsonl', '.ndjson')):
                documents_here = _jsonl(path, field, bad, max_bad_lines)
            else:
                documents_here = iter([Document(str(path), path.read_bytes())])
            for document in documents_here:
                if document.content.strip():
                    found = True
                    yield document
        except OSError as error:
            raise UserError(
                f'data.path: {path} cannot be read ({error.strerror or error}); check that it exists and is readable'
            ) from error
    if not found:
        raise UserError(f'data.path {pattern} has no text in {len(paths)} file(s); give files that are not empty')


def _expand(pattern: str) -> Iterator[epath.Path]:
    path = epath.Path(pattern)
    if any(mark in pattern for mark in '*?['):
        fixed = [part for part in path.parts if not any(mark in part for mark in '*?[')]
        root = epath.Path(*path.parts[: path.parts.index(next(p for p in path.parts if p not in fixed))])
        yield from sorted(found for found in root.glob('/'.join(path.parts[len(root.parts) :])) if found.is_file())
    elif path.is_dir():
        suffixes = (*TEXT_SUFFIXES, '.jsonl', '.ndjson')
        yield from sorted(found for found in _walk(path) if str(found).endswith(suffixes))
    else:
        yield path


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry


def _jsonl(path: epath.Path, field: str, bad: list[str], max_bad_lines: int) -> Iterator[Document]:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)[field]
            if not isinstance(text, str):
                raise TypeError(f'field {field!r} is {type(text).__name__}, not text')
        except KeyError:
            problem = f'has no field {field!r}'
        except (ValueError, TypeError) as error:
            problem = f'cannot be read ({error})'
        else:
            yield Document(f'{path}:{number}', text.encode())
            continue
        bad.append(f'{path}:{number} {problem}')
        if len(bad) > max_bad_lines:
            raise UserError(
                f'{bad[-1]}; {len(bad)} damaged line(s) where data.max_bad_lines={max_bad_lines}: mend them, or allow more'
            )


def is_heldout(content: bytes, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its content, so that copies of a file never fall on both sides."""
    digest = hashlib.sha256(content.strip()).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64 < fraction
