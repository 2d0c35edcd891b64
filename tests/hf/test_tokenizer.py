"""An imported parent's tokenizer reads all text and goes along with every slice; its own library says what is right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from etils import epath

from elastic_jax.api import open_checkpoint
from elastic_jax.config_file import load_config
from elastic_jax.data.pipeline import make_iterator
from elastic_jax.errors import UserError
from elastic_jax.hf.importing import import_checkpoint
from elastic_jax.train.setup import make_plan
from elastic_jax.train.workdir import keep_tokenizer
from tests.data.bpe import write_tokenizer
from tests.hf.oracle import CASES, LLAMA, load_model, make_model

TEXTS = ['def function(argument): return argument * 2', 'größe → 日本語', 'return function(2) # argument']
EXPERIMENT = Path(__file__).parents[2] / 'experiments' / 'elastic_from_hf.py'


@pytest.fixture(scope='module')
def imported(tmp_path_factory) -> Path:
    """A workdir imported from a parent with a small BPE tokenizer and moved since; the folder it came from is gone."""
    root = tmp_path_factory.mktemp('tokenizer')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CASES, 'parent', ('llama', LLAMA | {'vocab_size': 400, 'eos_token_id': 0}))
        make_model('parent', root / 'parent')
    write_tokenizer(root / 'parent')
    (root / 'parent' / 'generation_config.json').write_text(json.dumps({'eos_token_id': [0, 7], 'temperature': 0.6}))
    import_checkpoint(root / 'parent', root / 'imported')
    shutil.copy(root / 'parent' / 'tokenizer.json', root / 'reference.json')
    (root / 'texts').mkdir()
    for n, text in enumerate(TEXTS):
        (root / 'texts' / f'{n}.txt').write_text(text)
    shutil.rmtree(root / 'parent')
    return (root / 'imported').rename(root / 'moved')


@pytest.fixture(scope='module')
def reference(imported) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(imported.parent / 'reference.json'))


def documents(batches: list[dict]) -> set[tuple[int, ...]]:
    """The documents that lie whole in a row of tokens, between two ends of text (0)."""
    found = set()
    for row in np.concatenate([batch['tokens'] for batch in batches]).tolist():
        ends = [i for i, token in enumerate(row) if token == 0]
        found |= {tuple(row[a + 1 : b]) for a, b in itertools.pairwise(ends) if b > a + 1}
    return found


def test_training_and_held_out_text_are_read_with_it(imported, reference):
    wanted = {tuple(reference.encode(text).ids) for text in TEXTS}
    texts = str(imported.parent / 'texts')
    overrides = [f'--config.data.path={texts}', '--config.data.heldout_fraction=0.0']
    config = load_config(f'{EXPERIMENT}:{imported},small=0.7,smoke', overrides)
    assert make_plan(config).tokenizer.vocab_size == reference.get_vocab_size()
    batches = make_iterator(config.data, split='train', batch_size=8, context=200, seed=0)
    assert documents([next(batches) for _ in range(3)]) == wanted
    held = open_checkpoint(imported).heldout(texts, context=200, batch_size=1)
    assert documents(held) and documents(held) <= wanted


def test_bytes_are_refused_for_a_parent_that_has_one(imported):
    config = load_config(f'{EXPERIMENT}:{imported},small=0.7,smoke', ['--config.data.tokenizer=bytes'])
    with pytest.raises(UserError, match=f'set config.data.tokenizer={imported / "tokenizer"}'):
        make_plan(config)


def test_tokens_that_end_the_parents_answers_end_those_of_its_slices_and_are_written_back(imported, tmp_path):
    checkpoint = open_checkpoint(imported)
    assert checkpoint.tokenizer.stop_ids == (0, 7)
    sliced = open_checkpoint(checkpoint.slice(None, tmp_path / 'sliced', widths={'mlp': 32}))
    assert sliced.tokenizer.stop_ids == (0, 7)
    generation = json.loads((Path(sliced.export('full', tmp_path / 'out')) / 'generation_config.json').read_text())
    assert generation == {'eos_token_id': [0, 7], 'temperature': 0.6}
    scratch = Path(shutil.copytree(imported, tmp_path / 'scratch'))  # of a run that had no config.json to begin with
    manifest = dataclasses.replace(checkpoint.manifest, hf_config=None)
    (scratch / 'checkpoints' / '0' / 'manifest' / 'metadata').write_text(json.dumps(manifest.to_json()))
    folder = Path(open_checkpoint(scratch).export('full', tmp_path / 'of_scratch'))
    assert json.loads((folder / 'config.json').read_text())['eos_token_id'] == [0, 7]


def test_files_of_a_tokenizer_that_is_not_read_here_go_along_everywhere(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, 'parent', ('llama', LLAMA | {'eos_token_id': [3, 5]}))
    make_model('parent', tmp_path / 'parent')
    kept = {'tokenizer.model': b'\x0a\x00', 'tokenizer_config.json': b'{"eos_token": "</s>"}', 'merges.txt': b'a b'}
    for name, content in kept.items():
        (tmp_path / 'parent' / name).write_bytes(content)
    (tmp_path / 'parent' / 'generation_config.json').unlink()
    import_checkpoint(tmp_path / 'parent', tmp_path / 'imported')
    checkpoint = open_checkpoint(tmp_path / 'imported')
    assert checkpoint.tokenizer.spec == {'kind': 'bytes'}
    out = open_checkpoint(checkpoint.slice('full', tmp_path / 'sliced')).export('full', tmp_path / 'out')
    keep_tokenizer(epath.Path(tmp_path / 'run'), 'bytes', str(tmp_path / 'imported'))
    for folder in (Path(out), tmp_path / 'run' / 'tokenizer'):
        assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert json.loads((Path(out) / 'generation_config.json').read_text())['eos_token_id'] == [3, 5]


@pytest.mark.slow
def test_a_slice_of_either_format_keeps_it_and_generates_what_transformers_does(imported, tmp_path):
    checkpoint, widths, prompt = open_checkpoint(imported), {'mlp': 32}, 'def function('
    sliced = open_checkpoint(checkpoint.slice(None, tmp_path / 'sliced', widths=widths))
    text = sliced.load('full').generate(prompt, max_tokens=12)
    folder = checkpoint.export(None, tmp_path / 'out', widths=widths)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs(prompt, return_tensors='pt')
    with torch.no_grad():
        found = load_model(folder).generate(**ids, max_new_tokens=12, do_sample=False)
    assert theirs.decode(found[0, ids['input_ids'].shape[1] :], skip_special_tokens=True) == text and text
