"""Corpora: named documents from the standard library, text, JSONL, Parquet or ArrayRecord files."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from elastic_jax.data.chat import ChatTemplate, is_chat
from elastic_jax.data.config import SourceConfig
from elastic_jax.data.files import DAMAGED, File, check_encoding, encoding_of, expand, lines, recoded
from elastic_jax.data.records import READERS, Record
from elastic_jax.data.report import Report
from elastic_jax.errors import UserError


class Document(NamedTuple):
    """One document: where it came from, its text in UTF-8 (or any bytes), and where in a chat the answers are, in characters."""

    name: str
    content: bytes
    answers: tuple[tuple[int, int], ...] | None = None


def documents(source: SourceConfig, template: ChatTemplate | None, report: Report) -> Iterator[Document]:
    """Every document of a source, in a fixed order; what is passed over is counted in `report`.

    Args:
      template: renders chats. Raises: UserError naming the file (and line) when there is nothing to read, or more lines are
      damaged than `source.max_bad_lines`.
    """
    check_encoding(source.encoding)
    if not source.path:
        if source.loss == 'answers':
            raise UserError(
                "data.loss='answers' needs chats, but data.path is empty, which stands for the standard library's source"
            )
        yield from _stdlib(report)
        return
    for file in expand(source.path):
        report.files += 1
        before = (report.documents, report.bad_lines)
        try:
            if file.system.info(file.path).get('size') == 0:  # None where a server does not say
                report.empty_files += 1
                continue
            kind = source.format or file.format
            _check_kind(file, kind, source)
            found = _text(file, source, report) if kind == 'text' else _records(file, kind, source, template, report)
            for document in found:
                if document.content.strip():
                    report.documents += 1
                    yield document
                else:
                    report.empty_documents += 1
        except DAMAGED as error:
            why = ' '.join(str(getattr(error, 'strerror', None) or error).split())
            raise UserError(f'data.path: {file.name} cannot be read ({why}); check that it exists and is readable') from error
        if (report.documents, report.bad_lines) == before:
            report.empty_files += 1
    if not report.documents:
        raise UserError(f'data.path {source.path} has no text in {report.files} file(s); give files that are not empty')


def _check_kind(file: File, kind: str, source: SourceConfig) -> None:
    if not source.format and file.path.endswith('.json'):
        raise UserError(
            f"{file.name} is JSON, which is not read as a whole: write one object a line (JSONL), or say data.format='jsonl' "
            "where it is so already, 'text' to take it as it is"
        )
    if kind == 'jsonl' and source.encoding == 'bytes':
        raise UserError(f"{file.name} is JSONL, which is text: give its encoding as data.encoding, such as 'utf-8', not 'bytes'")


def _stdlib(report: Report) -> Iterator[Document]:
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
            report.files += 1
            report.documents += 1
            yield Document('/'.join(parts), content)


def _text(file: File, source: SourceConfig, report: Report) -> Iterator[Document]:
    """The whole file as one document, without the lines that cannot be decoded."""
    if source.loss == 'answers':
        raise UserError(
            f"{file.name} is text, but data.loss='answers' needs chats: a JSONL field with messages, or data.loss='all'"
        )
    with file.open() as stream:
        encoding = encoding_of(stream, source.encoding, report)
        begun = stream.tell()
        content = stream.read()
        try:
            yield Document(file.name, recoded(content, encoding))
        except UnicodeDecodeError:
            stream.seek(begun)
            good = []
            for number, line, problem in lines(stream, encoding):
                if line is None:
                    report.damaged(f'{file.name}:{number}', problem)
                else:
                    good.append(line)
            yield Document(file.name, b''.join(good))


def _records(file: File, kind: str, source: SourceConfig, template: ChatTemplate | None, report: Report) -> Iterator[Document]:
    for record in READERS[kind](file, (source.field, 'tools'), source.encoding, report):
        problem, document = record.problem, None
        if not problem:
            problem, document = _document(record, source, template)
        if problem:
            report.damaged(record.where, problem)
        else:
            yield document


def _document(record: Record, source: SourceConfig, template: ChatTemplate | None) -> tuple[str, Document | None]:
    """('', the document) of a good record, or (the problem, None)."""
    field, value, tools = source.field, record.value, None
    if isinstance(value, dict):
        if field not in value:
            return f'has no field {field!r}', None
        value, tools = value[field], value.get('tools')
    elif field and not isinstance(value, bytes):
        return f'is no object with a field {field!r}', None
    if isinstance(value, bytes):
        try:
            value = recoded(value, source.encoding)
        except UnicodeDecodeError:
            return f'is not {source.encoding}', None
    elif isinstance(value, str):
        try:
            value = value.encode()
        except UnicodeEncodeError:
            return 'cannot be read (half a surrogate pair)', None
    if isinstance(value, bytes):
        if source.loss == 'answers':
            return f"field {field!r} is text, but data.loss='answers' needs a chat (a list of messages)", None
        return '', Document(record.where, value)
    return _chat(record.where, field, value, tools, source, template)


def _chat(
    where: str, field: str, value: Any, tools: Any, source: SourceConfig, template: ChatTemplate | None
) -> tuple[str, Document | None]:
    if not is_chat(value):
        return f'cannot be read (field {field!r} is {type(value).__name__}, not text or a list of messages)', None
    if template is None:
        raise UserError(
            f'{where} is a chat, but the tokenizer in {source.tokenizer} has no chat template; '
            'give a file with one as data.chat_template'
        )
    try:
        text, answers = template.render(value, tools)
        content = text.encode()
    except (ValueError, TypeError) as error:
        return f'cannot be rendered as a chat ({" ".join(str(error).split())})', None
    if source.loss == 'answers' and not answers:
        return "has no answer to score (data.loss='answers')", None
    return '', Document(where, content, answers)


def is_heldout(content: bytes, fraction: float) -> bool:
    """Whether a document is held out: by a hash of its content, so that copies of a file never fall on both sides."""
    digest = hashlib.sha256(content.strip()).digest()
    return int.from_bytes(digest[:8], 'big') / 2**64 < fraction
