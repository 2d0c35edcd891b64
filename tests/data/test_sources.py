"""Corpora: what is read, what is left out, and the sentence for what cannot be read."""

import json

import pytest

from elastic_jax.data.sources import documents, is_heldout
from elastic_jax.errors import UserError


def test_the_standard_library_comes_as_bytes_without_tests_or_installed_packages():
    found = list(documents('', 'text', 0))
    names = {document.name for document in found}
    assert {'argparse.py', 'json/decoder.py', 'os.py'} <= names
    for name in names:
        assert 'site-packages' not in name and '/test' not in f'/{name}'.replace('/testcapi', ''), name
    assert sum(len(document.content) for document in found) > 5_000_000
    assert all(isinstance(document.content, bytes) for document in found)


def test_jsonl_lines_are_documents_and_damaged_ones_are_named(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text(
        '\n'.join([json.dumps({'body': 'one'}), '', json.dumps({'body': 'zwei ü'}), '{"body": 3}', '{broken', '{"x": 1}'])
    )
    with pytest.raises(UserError, match=r'a\.jsonl:4 cannot be read .*max_bad_lines=0'):
        list(documents(str(path), 'body', 0))
    with pytest.raises(UserError, match=r"a\.jsonl:6 has no field 'body'; 3 damaged"):
        list(documents(str(path), 'body', 2))
    good = list(documents(str(path), 'body', 3))
    assert [document.content.decode() for document in good] == ['one', 'zwei ü']
    assert good[1].name.endswith('a.jsonl:3')


@pytest.mark.parametrize(('make', 'message'), [(None, 'cannot be read'), (b'  \n', 'has no text')])
def test_an_empty_or_unreadable_corpus_is_one_sentence(tmp_path, make, message):
    path = tmp_path / 'corpus.txt'
    if make is not None:
        path.write_bytes(make)
    with pytest.raises(UserError, match=message):
        list(documents(str(path), 'text', 0))
    with pytest.raises(UserError, match='matches no file'):
        list(documents(str(tmp_path / '*.nothing'), 'text', 0))


def test_the_split_depends_on_content_alone():
    contents = [f'file {i}'.encode() for i in range(4000)]
    held = [is_heldout(content, 0.1) for content in contents]
    assert 300 < sum(held) < 500
    assert held == [is_heldout(content + b'\n', 0.1) for content in contents]  # a copy falls on the same side
    assert not any(is_heldout(content, 0.0) for content in contents) and all(is_heldout(content, 1.0) for content in contents)
