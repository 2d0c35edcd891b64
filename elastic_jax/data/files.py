"""Files of a corpus: found by path, folder or glob pattern in any file system fsspec knows, and read line by line."""

from __future__ import annotations

import codecs
import dataclasses
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

import fsspec

from elastic_jax.data.report import Report
from elastic_jax.errors import UserError

TEXT_SUFFIXES = ('.txt', '.md', '.py', '.rst', '.text')
FORMAT_OF_SUFFIX = {
    **dict.fromkeys(TEXT_SUFFIXES, 'text'),
    '.jsonl': 'jsonl',
    '.ndjson': 'jsonl',
    '.parquet': 'parquet',
    '.array_record': 'arrayrecord',
    '.arrayrecord': 'arrayrecord',
}
# Byte order marks; those of UTF-32 first, as one begins with one of UTF-16.
MARKS = {
    codecs.BOM_UTF8: 'utf-8',
    codecs.BOM_UTF32_LE: 'utf-32-le',
    codecs.BOM_UTF32_BE: 'utf-32-be',
    codecs.BOM_UTF16_LE: 'utf-16-le',
    codecs.BOM_UTF16_BE: 'utf-16-be',
}
COMPRESSED = ('.gz', '.bz2', '.xz', '.zst')
# What reading a damaged file raises, compressed ones included.
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclasses.dataclass(frozen=True)
class File:
    """One file of a file system."""

    system: Any
    path: str

    @property
    def name(self) -> str:
        """As errors and documents name it."""
        return self.path if 'file' in _protocols(self.system) else self.system.unstrip_protocol(self.path)

    @property
    def format(self) -> str:
        """What the name says the file is; 'text' when it says nothing."""
        plain = next((self.path.removesuffix(end) for end in COMPRESSED if self.path.endswith(end)), self.path)
        return next((kind for suffix, kind in FORMAT_OF_SUFFIX.items() if plain.endswith(suffix)), 'text')

    def open(self) -> Any:
        """The bytes, decompressed by suffix, as a binary file. Raises UserError when what that takes is not installed."""
        # fsspec takes a suffix that it does not know for none at all.
        if self.path.endswith('.zst') and 'zstd' not in fsspec.available_compressions():
            raise UserError(f'data.path: {self.name} needs a package that is not installed: pip install zstandard')
        return self.system.open(self.path, 'rb', compression='infer')

    def open_raw(self) -> Any:
        return self.system.open(self.path, 'rb')

    def stamp(self) -> list[Any]:
        """What changes when the file does: name, size, and time or the file system's own mark."""
        info = self.system.info(self.path)
        mark = info.get('mtime') if 'mtime' in info else self.system.ukey(self.path)
        return [self.name, info.get('size'), mark]


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def expand(pattern: str) -> list[File]:
    """The files of a path, a folder (those with a known suffix, at any depth), or a glob pattern, sorted.

    Raises: UserError when the path cannot be looked at, or a pattern or folder holds no file.
    """
    try:
        system, path = fsspec.core.url_to_fs(pattern)
        if any(mark in path for mark in '*?[') and not system.exists(path):
            found = [name for name in system.glob(path) if system.isfile(name)]
        elif system.isdir(path):
            suffixes = tuple(FORMAT_OF_SUFFIX) + tuple(s + end for s in FORMAT_OF_SUFFIX for end in COMPRESSED)
            found = [name for name in system.find(path) if name.endswith(suffixes)]
        elif system.exists(path):
            found = [path]
        else:
            raise FileNotFoundError(2, 'No such file or directory')
    except ImportError as error:
        raise UserError(f'data.path: {pattern} needs a package that is not installed ({error})') from error
    except (OSError, ValueError) as error:
        raise UserError(f'data.path: {pattern} cannot be read ({_why(error)}); check that it exists and is readable') from error
    if not found:
        raise UserError(
            f'data.path {pattern} matches no file; give an existing file of text, JSONL, Parquet or ArrayRecord, a folder, '
            'or a glob pattern'
        )
    return [File(system, name) for name in sorted(found)]


def _why(error: BaseException) -> str:
    return ' '.join(str(getattr(error, 'strerror', None) or error).split())


def encoding_of(stream: Any, encoding: str, report: Report) -> str:
    """The encoding of a file just opened: as configured, unless a byte order mark says otherwise.

    The stream then stands after the mark. What is not UTF-8 by its mark is counted in `report`.
    """
    head = stream.read(4)
    mark = next((mark for mark in MARKS if head.startswith(mark)), b'')
    stream.seek(len(mark))
    if mark and mark != codecs.BOM_UTF8:
        report.recoded_files += 1
    return MARKS.get(mark, encoding)


def lines(stream: Any, encoding: str) -> Iterator[tuple[int, bytes | None, str]]:
    """(number from 1, the line in UTF-8 with its end, what is wrong with it) of a binary file; the line is None when damaged."""
    wide = codecs.lookup(encoding).name.startswith(('utf-16', 'utf-32'))
    if wide:  # line ends are several bytes: an undecodable one shows as U+FFFD
        for number, line in enumerate(io.TextIOWrapper(stream, encoding, errors='replace', newline='\n'), start=1):
            damaged = '\ufffd' in line
            yield number, None if damaged else line.encode(), f'is not {encoding}' if damaged else ''
        return
    for number, line in enumerate(stream, start=1):
        try:
            yield number, recoded(line, encoding), ''
        except UnicodeDecodeError as error:
            wrong = f'byte 0x{line[error.start]:02x} at column {error.start + 1}'
            yield number, None, f'is not {encoding} ({wrong}): give its encoding as data.encoding'


def recoded(content: bytes, encoding: str) -> bytes:
    """Bytes of some encoding as UTF-8; 'bytes' takes them as they are. Raises UnicodeDecodeError."""
    if encoding == 'bytes':
        return content
    text = content.decode(encoding)
    return content if encoding == 'utf-8' else text.encode()


def check_encoding(encoding: str) -> None:
    """Raises UserError for an encoding of text that Python does not know."""
    if encoding != 'bytes':
        try:
            ''.encode(encoding)
        except LookupError as error:
            raise UserError(f'data.encoding={encoding!r} is unknown; use utf-8, latin-1, cp1252, utf-16, … or bytes') from error
