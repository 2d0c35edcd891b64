"""Hugging Face -> elastic checkpoint -> Hugging Face, by the functions that the commands call."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from elastic_jax.arch import Arch
from elastic_jax.checkpoint.leaf_reader import LeafReader
from elastic_jax.checkpoint.restore import read_manifest, restore_slice
from elastic_jax.errors import UserError, WorkError
from elastic_jax.hf.folder import read_arch
from elastic_jax.hf.from_checkpoint import export_checkpoint
from elastic_jax.hf.hub import push, resolve
from elastic_jax.hf.importing import import_checkpoint
from elastic_jax.model.params import leaves, param_table
from elastic_jax.nest.slice import slice_params
from tests.hf.oracle import load_model, make_model, torch_logits
from tests.hf.ours import TOKENS_2x37, assert_close, load_params, our_logits


@pytest.fixture(scope='module')
def imported(tmp_path_factory) -> tuple[Path, Path]:
    """(the Hugging Face folder with a tokenizer, the checkpoint imported from it)."""
    folder, workdir = tmp_path_factory.mktemp('parent'), tmp_path_factory.mktemp('work')
    make_model('nemotron_h', folder)
    (folder / 'tokenizer.json').write_text('{"model": {}}')
    (folder / 'generation_config.json').write_text('{"temperature": 0.6}')
    with pytest.MonkeyPatch.context() as patch:  # leaves are read and written in several parts, which wait for each other
        patch.setattr('elastic_jax.checkpoint.lazy.PART', 1000)
        patch.setattr('elastic_jax.checkpoint.lazy.IN_FLIGHT', 2000)
        import_checkpoint(folder, workdir)
    return folder, workdir


def equal(tree: dict, other: dict, arch: Arch) -> bool:
    pairs = [(np.asarray(tree[group][name]), np.asarray(other[group][name])) for group, name, _ in leaves(param_table(arch))]
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def test_import_is_an_ordinary_checkpoint_with_the_budget_full(imported):
    folder, workdir = imported
    manifest, params = read_manifest(workdir), load_params(folder)
    assert list(manifest.budgets) == ['full'] and manifest.budgets['full'].arch == manifest.arch == read_arch(folder)
    assert manifest.budgets['full'].costs['parameters'] == sum(leaf.size for named in params.values() for leaf in named.values())
    assert equal(restore_slice(workdir, manifest.arch), params, manifest.arch)
    child = manifest.arch.narrow(embed=24, experts=4, expert_width=8, mlp=20, mamba_heads=4)
    reader = LeafReader(workdir, child)
    read = {group: {} for group in param_table(child)}
    for group, name, _ in leaves(param_table(child)):
        read[group][name] = reader(group, name)
    assert equal(read, slice_params(params, manifest.arch, child), child)


def test_slice_of_an_import_is_the_same_model_in_transformers(imported, tmp_path):
    _, workdir = imported
    child = read_manifest(workdir).arch.narrow(embed=24, experts=4, mamba_heads=4, layers=4)
    out = export_checkpoint(workdir, child, tmp_path / 'out', budget='full')
    assert_close(our_logits(restore_slice(workdir, child), child, TOKENS_2x37), torch_logits(load_model(out), TOKENS_2x37))
    assert (out / 'tokenizer.json').read_text() == '{"model": {}}'
    assert json.loads((out / 'generation_config.json').read_text()) == {'temperature': 0.6}


def test_bfloat16_parent_stays_bfloat16_and_comes_back_unchanged(tmp_path):
    make_model('qwen3_moe', tmp_path / 'model').to(torch.bfloat16).save_pretrained(tmp_path / 'half')
    arch = import_checkpoint(tmp_path / 'half', tmp_path / 'work')
    stored = restore_slice(tmp_path / 'work', arch)
    assert stored['layer_000']['q'].dtype == ml_dtypes.bfloat16 and stored['layer_001']['router'].dtype == np.float32
    out = export_checkpoint(tmp_path / 'work', arch, tmp_path / 'out')
    assert equal(load_params(out), load_params(tmp_path / 'half'), arch)


def test_taken_workdir_is_left_alone(imported):
    folder, workdir = imported
    before = sorted(path.name for path in workdir.rglob('*'))
    with pytest.raises(UserError, match='holds checkpoints already'):
        import_checkpoint(folder, workdir)
    assert sorted(path.name for path in workdir.rglob('*')) == before


FULL_DISK = """
import resource, sys
from elastic_jax.errors import WorkError
from elastic_jax.hf.from_checkpoint import export_checkpoint
from elastic_jax.hf.importing import import_checkpoint
from elastic_jax.checkpoint.restore import read_manifest
what, source, out = sys.argv[1:]
arch = read_manifest(source).arch if what == 'export' else None
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))
try:
    import_checkpoint(source, out) if what == 'import' else export_checkpoint(source, arch, out)
except WorkError as error:
    print(error)
"""


@pytest.mark.parametrize('what', ['import', 'export'])
def test_failing_writes_leave_nothing_that_looks_whole(what, imported, tmp_path):
    """A limit on the size of files makes writes fail, as a full disk does."""
    source = imported[0] if what == 'import' else imported[1]
    out = tmp_path / 'out'
    command = [sys.executable, '-c', FULL_DISK, what, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and 'failed' in done.stdout, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


def test_what_is_neither_folder_nor_reachable_id_is_refused(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    for name in (str(tmp_path / 'missing'), 'a/b/c', './x'):
        with pytest.raises(UserError, match='no folder, and no id'):
            resolve(name)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(UserError, match='cannot be fetched'):
        resolve('nobody-here/no-such-model')
    with pytest.raises(WorkError, match='is written, but uploading'):
        push(tmp_path, 'nobody-here/no-such-model')


def test_tokenizer_that_went_away_is_missed_not_left_out(imported, tmp_path):
    workdir = Path(shutil.copytree(imported[1], tmp_path / 'moved'))
    arch = read_manifest(workdir).arch
    out = export_checkpoint(workdir, arch, tmp_path / 'out')
    assert (out / 'tokenizer.json').exists()
    (workdir / 'tokenizer' / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match='no longer'):
        export_checkpoint(workdir, arch, tmp_path / 'again')
