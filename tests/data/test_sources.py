"""Corpora: what is read, in every format, what is passed over and counted, and the sentence for what cannot be read."""

import bz2
import dataclasses
import gzip
import json
import lzma
import random

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from elastic_jax.data.chat import load_template
from elastic_jax.data.config import SourceConfig, default_data_config, sources_of
from elastic_jax.data.report import Report
from elastic_jax.data.sources import documents, is_heldout
from elastic_jax.data.tokenizers import ByteTokenizer
from elastic_jax.errors import UserError


def make_source(path, **changes) -> SourceConfig:
    ((source, _),) = sources_of(default_data_config())
    return dataclasses.replace(source, path=str(path), **changes)


def read(path, **changes):
    """(texts, report) of a source."""
    source = make_source(path, **changes)
    report = Report(source.max_bad_lines)
    found = list(documents(source, load_template('', ByteTokenizer()), report))
    assert report.documents == len(found)
    return [document.content.decode() for document in found], report


def write_arrayrecord(path, records):
    writer = ArrayRecordWriter(str(path), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()


def test_the_standard_library_comes_as_bytes_without_tests_or_installed_packages():
    found = list(documents(make_source(''), None, Report()))
    names = {document.name for document in found}
    assert {'argparse.py', 'json/decoder.py', 'os.py'} <= names
    for name in names:
        assert 'site-packages' not in name and '/test' not in f'/{name}'.replace('/testcapi', ''), name
    assert sum(len(document.content) for document in found) > 5_000_000
    assert all(isinstance(document.content, bytes) for document in found)


TEXTS = ['one', 'zwei ü', '三 🙂', 'line\nline']


def test_every_format_gives_the_same_documents(tmp_path):
    rows = [{'body': text, 'other': 1} for text in TEXTS]
    lines = '\n'.join(json.dumps(row) for row in rows)
    (tmp_path / 'a.jsonl').write_text(lines)
    (tmp_path / 'crlf.ndjson').write_bytes(lines.replace('\n', '\r\n').encode())
    (tmp_path / 'z.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    (tmp_path / 'wide.jsonl').write_bytes('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows).encode('utf-16'))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet', row_group_size=2)
    write_arrayrecord(tmp_path / 'a.array_record', [json.dumps(row).encode() for row in rows])
    write_arrayrecord(tmp_path / 'plain.array_record', [text.encode() for text in TEXTS])
    for name in ('a.jsonl', 'crlf.ndjson', 'z.jsonl.gz', 'wide.jsonl', 'a.parquet', 'a.array_record'):
        assert read(tmp_path / name, field='body')[0] == TEXTS, name
    assert read(tmp_path / 'plain.array_record', field='')[0] == TEXTS
    pieces = tmp_path / 'records'
    pieces.mkdir()
    (pieces / 'part-0').write_text(lines)
    assert read(pieces / 'part-*', field='body', format='jsonl')[0] == TEXTS


def test_files_are_found_by_folder_pattern_and_url(tmp_path):
    for name in ('a.txt', 'b.md', 'deep/c.txt', 'deep/d.dat'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path)[0] == ['a.txt', 'b.md', 'deep/c.txt']
    assert read(tmp_path / '*.txt')[0] == ['a.txt']
    assert read(tmp_path / '**' / '*.txt')[0] == ['a.txt', 'deep/c.txt']
    assert read(tmp_path / 'deep' / 'd.dat')[0] == ['deep/d.dat']
    memory = fsspec.filesystem('memory')
    memory.pipe({'/corpus/0.jsonl': json.dumps({'text': 'far'}).encode(), '/corpus/1.txt': b'away'})
    assert read('memory://corpus')[0] == ['far', 'away']
    write_arrayrecord(tmp_path / 'x', [b'"far"', b'{"text": "off"}'])
    memory.pipe({'/records/x.array_record': (tmp_path / 'x').read_bytes()})
    texts, report = read('memory://records/*', max_bad_lines=1)
    assert texts == ['off'] and 'x.array_record:1 is no object' in report.bad[0]


def test_damaged_jsonl_lines_are_named_counted_and_limited(tmp_path):
    path = tmp_path / 'a.jsonl'
    good = [json.dumps({'body': 'one'}), '', json.dumps({'body': 'zwei ü'})]
    path.write_bytes('\n'.join([*good, '{"body": 3}', '{broken', '{"x": 1}', '7', '']).encode() + b'{"body": "\xe9"}')
    for limit, message in enumerate(
        [
            r'a\.jsonl:4 cannot be read .*1 damaged line.*max_bad_lines=0',
            r'a\.jsonl:5 cannot be read .*2 damaged',
            r"a\.jsonl:6 has no field 'body'; 3 damaged",
            r'a\.jsonl:7 is no object',
            r'a\.jsonl:8 is not utf-8 \(byte 0xe9 at column 11\).*data\.encoding',
        ]
    ):
        with pytest.raises(UserError, match=message):
            read(path, field='body', max_bad_lines=limit)
    texts, report = read(path, field='body', max_bad_lines=5)
    assert texts == ['one', 'zwei ü'] and report.bad_lines == len(report.bad) == 5
    assert 'a.jsonl:4' in report.summary()


def test_text_in_another_encoding_is_read_as_configured_or_passed_over_by_line(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_bytes('erste\ngröße\nletzte\n'.encode('latin-1'))
    with pytest.raises(UserError, match=r'a\.txt:2 is not utf-8 \(byte 0xf6 at column 3\)'):
        read(path)
    assert read(path, max_bad_lines=1)[0] == ['erste\nletzte\n']
    assert read(path, encoding='latin-1')[0] == ['erste\ngröße\nletzte\n']
    source = make_source(path, encoding='bytes')
    assert next(documents(source, None, Report())).content == path.read_bytes()
    path.write_bytes(b'\xef\xbb\xbfplain')
    assert read(path)[0] == ['plain']
    for wide in ('utf-16', 'utf-32'):
        path.write_bytes('größe'.encode(wide))
        texts, report = read(path)
        assert texts == ['größe'] and report.recoded_files == 1
    for encoding in ('zip', 'latin-7x'):
        with pytest.raises(UserError, match=f"data.encoding='{encoding}' is unknown"):
            read(path, encoding=encoding)
    path.with_suffix('.jsonl').write_text('{"text": "a"}')
    with pytest.raises(UserError, match=r'a\.jsonl is JSONL, which is text: give its encoding'):
        read(path.with_suffix('.jsonl'), encoding='bytes')
    path.with_suffix('.json').write_text('[{"text": "a"}]')
    with pytest.raises(UserError, match=r'a\.json is JSON, which is not read as a whole'):
        read(path.with_suffix('.json'))
    assert read(path.with_suffix('.json'), format='text')[0] == ['[{"text": "a"}]']


def test_a_file_whose_size_no_server_says_is_not_empty(tmp_path, monkeypatch):
    (tmp_path / 'a.txt').write_text('words')
    system = fsspec.filesystem('file')
    plain = system.info
    monkeypatch.setattr(type(system), 'info', lambda self, path, **more: plain(path, **more) | {'size': None})
    assert read(tmp_path / 'a.txt')[0] == ['words']


def test_damaged_parquet_and_arrayrecord_files_are_named(tmp_path):
    rows = [{'text': f'row {i}'} for i in range(6)] + [{'text': None}]
    whole = tmp_path / 'whole.parquet'
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), whole)
    with pytest.raises(UserError, match=r'whole\.parquet:7 cannot be read \(field .text. is NoneType'):
        read(whole)
    assert len(read(whole, max_bad_lines=1)[0]) == 6
    with pytest.raises(UserError, match=r"whole\.parquet has no column 'body'; its columns are text"):
        read(whole, field='body')
    cut = tmp_path / 'cut.parquet'
    cut.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(UserError, match=r'cut\.parquet:1 cannot be read as Parquet'):
        read(cut)
    texts, report = read(tmp_path / '*.parquet', max_bad_lines=2)
    assert len(texts) == 6 and report.bad_lines == 2 and report.empty_files == 0
    records = tmp_path / 'cut.array_record'
    write_arrayrecord(records, [b'{}'] * 5)
    records.write_bytes(records.read_bytes()[:-100])
    with pytest.raises(UserError, match=r'cut\.array_record:1 cannot be read as ArrayRecord'):
        read(records)


def test_empty_files_and_documents_are_counted(tmp_path):
    for name, text in (('a.txt', ''), ('b.txt', ' \n'), ('c.txt', 'words'), ('d.jsonl', '{"text": ""}\n{"text": "x"}')):
        (tmp_path / name).write_text(text)
    texts, report = read(tmp_path)
    assert texts == ['words', 'x']
    assert (report.files, report.empty_files, report.empty_documents) == (4, 2, 2)


@pytest.mark.parametrize(('make', 'message'), [(None, 'cannot be read'), (b'  \n', 'has no text'), (b'', 'has no text')])
def test_an_empty_or_unreadable_corpus_is_one_sentence(tmp_path, make, message):
    path = tmp_path / 'corpus.txt'
    if make is not None:
        path.write_bytes(make)
    with pytest.raises(UserError, match=message):
        read(path)
    with pytest.raises(UserError, match='matches no file'):
        read(tmp_path / '*.nothing')
    with pytest.raises(UserError, match='nosuch'):
        read('nosuch://bucket/file')


@pytest.mark.parametrize('suffix', ['gz', 'bz2', 'xz', 'zst'])
def test_a_compressed_file_cut_off_or_not_to_be_unpacked_is_one_sentence(tmp_path, monkeypatch, suffix):
    path = tmp_path / f'cut.txt.{suffix}'
    if suffix == 'zst':
        monkeypatch.setattr(fsspec, 'available_compressions', lambda: ['gzip'])
        path.write_bytes(b'(\xb5/\xfd')
    else:
        module = {'gz': gzip, 'bz2': bz2, 'xz': lzma}[suffix]
        path.write_bytes(module.compress(random.Random(0).randbytes(5000).hex().encode())[:2000])
    with pytest.raises(UserError, match=f'{path.name} (cannot be read|needs a package that is not installed)') as error:
        read(path)
    assert '\n' not in str(error.value)


def test_the_split_depends_on_content_alone():
    contents = [f'file {i}'.encode() for i in range(4000)]
    held = [is_heldout(content, 0.1) for content in contents]
    assert 300 < sum(held) < 500
    assert held == [is_heldout(content + b'\n', 0.1) for content in contents]  # a copy falls on the same side
    assert not any(is_heldout(content, 0.0) for content in contents) and all(is_heldout(content, 1.0) for content in contents)
