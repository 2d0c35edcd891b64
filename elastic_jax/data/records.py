"""Records of JSONL, Parquet and ArrayRecord files: each an object with fields, or what is wrong with it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from elastic_jax.data.files import File, encoding_of, lines
from elastic_jax.data.report import Report
from elastic_jax.errors import UserError

AT_A_TIME = 1024


class Record(NamedTuple):
    """Where it stands ('FILE:NUMBER'), its value, and the problem ('' for a good one)."""

    where: str
    value: Any
    problem: str = ''


def jsonl_records(file: File, columns: tuple[str, ...], encoding: str, report: Report) -> Iterator[Record]:
    """One record for each line that is not blank."""
    with file.open() as stream:
        for number, line, problem in lines(stream, encoding_of(stream, encoding, report)):
            if problem:
                yield Record(f'{file.name}:{number}', None, problem)
            elif line.strip():
                yield _parsed(f'{file.name}:{number}', line)


def _parsed(where: str, content: bytes) -> Record:
    try:
        return Record(where, json.loads(content))
    except (ValueError, RecursionError) as error:
        return Record(where, None, f'cannot be read ({error})')


def parquet_records(file: File, columns: tuple[str, ...], encoding: str, report: Report) -> Iterator[Record]:
    """One record for each row, holding those of `columns` that the file has. Rows are numbered from 1."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{file.name} is a Parquet file, for which pyarrow is needed: pip install pyarrow') from error
    number = 0
    with file.open_raw() as stream:
        try:
            table = pyarrow.parquet.ParquetFile(stream)
            own = [name for name in columns if name in table.schema_arrow.names]
            if columns[0] not in own:
                raise UserError(
                    f'{file.name} has no column {columns[0]!r}; its columns are {", ".join(table.schema_arrow.names)}'
                )
            for batch in table.iter_batches(AT_A_TIME, columns=own):
                for row in batch.to_pylist():
                    number += 1
                    yield Record(f'{file.name}:{number}', row)
        except (pyarrow.ArrowException, OSError) as error:
            yield Record(f'{file.name}:{number + 1}', None, f'cannot be read as Parquet ({_one_line(error)})')


def arrayrecord_records(file: File, columns: tuple[str, ...], encoding: str, report: Report) -> Iterator[Record]:
    """One record for each stored one: a JSON object, or text when the configured field is ''. Numbered from 1."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise UserError(
            f'{file.name} is an ArrayRecord file, for which array_record is needed: pip install array_record'
        ) from error
    parse: Callable[[str, bytes], Record] = _parsed if columns[0] else Record
    with tempfile.TemporaryDirectory() as folder:
        local = file.path
        if file.name != file.path:  # the reader maps files of this machine
            local = str(Path(folder) / 'copy.array_record')
            file.system.get_file(file.path, local)
        number = 0
        try:
            reader = ArrayRecordReader(local)
            total = reader.num_records()
            while number < total:
                for content in reader.read(number, min(number + AT_A_TIME, total)):
                    number += 1
                    yield parse(f'{file.name}:{number}', content)
            reader.close()
        except RuntimeError as error:
            yield Record(f'{file.name}:{number + 1}', None, f'cannot be read as ArrayRecord ({_one_line(error)})')


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split())


READERS = {'jsonl': jsonl_records, 'parquet': parquet_records, 'arrayrecord': arrayrecord_records}
