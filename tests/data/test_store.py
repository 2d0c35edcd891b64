"""Tokens kept on disk are those read afresh; an entry that was cut off is built again, a changed corpus is another entry."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from elastic_jax.data import store as store_module
from elastic_jax.data.config import default_data_config
from elastic_jax.data.pipeline import load_stores
from elastic_jax.errors import UserError
from tests.data.bpe import write_tokenizer
from tests.data.test_chat import CHAT


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / 'corpus'
    corpus.mkdir()
    for i in range(20):
        chat = [*CHAT[:2], {'role': 'assistant', 'content': f'answer {i}'}]
        (corpus / f'{i:02d}.jsonl').write_text('\n'.join([json.dumps({'messages': chat}), '{']))
    config = default_data_config()
    config.update({'path': str(corpus), 'field': 'messages', 'loss': 'answers', 'max_bad_lines': 20, 'heldout_fraction': 0.5})
    config.cache = str(tmp_path / 'cache')
    return config


def afresh(config, split='train'):
    """The store as another process would open it."""
    store_module._load.cache_clear()
    (store,) = load_stores(config, split).values()
    return store


def entry_of(config):
    (entry,) = [path for path in os.scandir(config.cache) if path.is_dir()]
    return entry.path


def assert_same(a, b):
    for name in ('tokens', 'starts', 'scored', 'bytes_of_token'):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.fingerprint == b.fingerprint


def test_cached_tokens_are_those_of_memory(config):
    for split in ('train', 'heldout'):
        built, mapped = afresh(config, split), afresh(config, split)
        assert isinstance(mapped.tokens.base, np.memmap) and not mapped.tokens.flags.writeable
        in_memory = config.copy_and_resolve_references()
        in_memory.cache = ''
        assert_same(built, mapped)
        assert_same(mapped, afresh(in_memory, split))


def test_a_second_reading_touches_no_document(config, monkeypatch):
    first = afresh(config)
    monkeypatch.setattr(store_module, 'documents', lambda *_: pytest.fail('read again'))
    assert_same(first, afresh(config))
    from elastic_jax.data.pipeline import read_all

    assert '20 damaged line(s) passed over' in read_all([config])[0]  # the report is kept as well


@pytest.mark.parametrize('damage', ['no marker', 'torn marker', 'short file', 'missing file'])
def test_an_entry_that_was_cut_off_is_built_again(config, damage):
    first = afresh(config)
    expected = [np.array(first.tokens), np.array(first.starts), np.array(first.scored)]
    entry = entry_of(config)
    marker, tokens = os.path.join(entry, 'complete.json'), os.path.join(entry, 'train.tokens.bin')
    if damage == 'no marker':
        os.remove(marker)
    elif damage == 'torn marker':
        os.truncate(marker, 20)
    elif damage == 'short file':
        os.truncate(tokens, os.path.getsize(tokens) - 2)
    else:
        os.remove(tokens)
    again = afresh(config)
    for name, values in zip(('tokens', 'starts', 'scored'), expected, strict=True):
        np.testing.assert_array_equal(getattr(again, name), values)
    assert again.fingerprint == first.fingerprint


def test_what_the_tokens_depend_on_makes_another_entry(config, tmp_path):
    def entries():
        afresh(config)
        return sum(path.is_dir() for path in os.scandir(config.cache))

    assert entries() == 1
    config.heldout_fraction = 0.3
    assert entries() == 2
    config.max_bad_lines = 30
    assert entries() == 3
    with open(os.path.join(config.path, '00.jsonl'), 'a') as file:
        file.write('\n')
    assert entries() == 4
    (tmp_path / 'other').mkdir()
    config.chat_template = str(tmp_path / 'template.jinja')
    for template in ('{% for m in messages %}{{ m.content }}{% endfor %}', '{% for m in messages %}-{{ m.content }}{% endfor %}'):
        (tmp_path / 'template.jinja').write_text(template)
        entries()
    assert entries() == 6
    config.tokenizer = str(write_tokenizer(tmp_path / 'other'))
    assert entries() == 7


def test_the_fingerprint_is_that_of_the_tokens_wherever_the_corpus_lies(config, tmp_path):
    first = afresh(config)
    os.rename(config.path, tmp_path / 'moved')
    config.path = str(tmp_path / 'moved')
    assert afresh(config).fingerprint == first.fingerprint
    config.loss = 'all'
    assert afresh(config).fingerprint != first.fingerprint


BUILD = """
import sys, time, json
from ml_collections import ConfigDict
from elastic_jax.data import store
from elastic_jax.data.pipeline import load_stores
plain = store.documents
def slowly(*args):
    print('reading', flush=True)
    for document in plain(*args):
        time.sleep(float(sys.argv[2]))
        yield document
store.documents = slowly
store.BATCH_BYTES = 1
(found,) = load_stores(ConfigDict(json.loads(sys.argv[1])), 'train').values()
print('tokens', len(found.tokens), flush=True)
"""


def start(config, pause):
    return subprocess.Popen([sys.executable, '-c', BUILD, config.to_json(), str(pause)], stdout=subprocess.PIPE, text=True)


def test_a_killed_build_leaves_nothing_that_is_taken_for_whole_and_no_lock(config):
    process = start(config, 0.2)
    assert process.stdout.readline() == 'reading\n'
    time.sleep(0.5)  # some documents are written
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not os.path.exists(os.path.join(entry_of(config), 'complete.json'))
    store = afresh(config)
    config.cache = ''
    assert_same(store, afresh(config))


def test_processes_that_start_together_build_once(config):
    processes = [start(config, 0.02) for _ in range(3)]
    lines = [process.communicate()[0].splitlines() for process in processes]
    assert sorted(len(own) for own in lines) == [1, 1, 2]
    assert len({own[-1] for own in lines}) == 1


def test_a_cache_that_cannot_be_used_is_said(config, tmp_path):
    (tmp_path / 'file').write_text('')
    config.cache = str(tmp_path / 'file')
    with pytest.raises(UserError, match=r'data\.cache: .* cannot be written'):
        afresh(config)
    config.cache = 'gs://bucket/cache'
    with pytest.raises(UserError, match='must be a folder of this machine'):
        afresh(config)


def test_a_file_that_changes_is_read_again_in_one_process(tmp_path):
    config = default_data_config()
    config.update({'path': str(tmp_path / 'notes.txt'), 'heldout_fraction': 1.0})
    for text in ('first', 'second and longer'):
        (tmp_path / 'notes.txt').write_text(text)
        (store,) = load_stores(config, 'heldout').values()
        assert bytes(store.tokens[:-1].astype(np.uint8)) == text.encode()


def test_of_a_text_that_stands_alone_the_end_is_held_out(tmp_path):
    path, lines = tmp_path / 'one.txt', [f'line {i}\n' for i in range(100)]
    path.write_text(''.join(lines))
    config = default_data_config()
    config.update({'path': str(path), 'heldout_fraction': 0.1})
    train, heldout = (
        bytes(store.tokens[:-1].astype(np.uint8)).decode()
        for split in ('train', 'heldout')
        for store in load_stores(config, split).values()
    )
    assert train + heldout == path.read_text() and 0.08 < len(heldout) / len(train + heldout) < 0.12
    assert heldout.startswith('line')
    path.write_text('word')
    with pytest.raises(UserError, match='it is a single document, so split it into several files or JSONL lines'):
        for split in ('train', 'heldout'):
            load_stores(config, split)
