"""Hugging Face -> elastic checkpoint -> Hugging Face, by the functions that the commands call."""

from __future__ import annotations

import fnmatch
import json
import os
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
from elastic_jax.cli import run
from elastic_jax.errors import UserError, WorkError
from elastic_jax.hf.folder import read_arch
from elastic_jax.hf.from_checkpoint import export_checkpoint
from elastic_jax.hf.hub import push, resolve
from elastic_jax.hf.importing import import_checkpoint
from elastic_jax.model.params import leaves, param_table
from elastic_jax.nest.slice import slice_params
from tests.hf.oracle import load_model, make_model, torch_logits
from tests.hf.ours import TOKENS_2x37, assert_close, load_params, our_logits

ROOT = Path(__file__).parents[2]


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


def test_bfloat16_parent_with_a_float32_norm_comes_back_unchanged(tmp_path):
    model = make_model('qwen3_moe', tmp_path / 'model').to(torch.bfloat16)
    model.model.norm.weight.data = torch.linspace(0.5, 1.5, len(model.model.norm.weight))
    model.save_pretrained(tmp_path / 'half')
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
from elastic_jax.api import open_checkpoint
from elastic_jax.errors import WorkError
from elastic_jax.hf.importing import import_checkpoint
what, source, out, limit = sys.argv[1:]
checkpoint = None if what == 'import' else open_checkpoint(source)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    import_checkpoint(source, out) if checkpoint is None else getattr(checkpoint, what)('full', out)
except WorkError as error:
    print(error)
"""


@pytest.mark.parametrize('what', ['import', 'export', 'slice'])
@pytest.mark.parametrize(
    'limit', [3_000, pytest.param(10, marks=pytest.mark.slow)]
)  # fits the tokenizer's file, or not even that
def test_failing_writes_leave_nothing_that_looks_whole(what, limit, imported, tmp_path):
    """A limit on the size of files makes writes fail, as a full disk does."""
    source = imported[0] if what == 'import' else imported[1]
    command = [sys.executable, '-c', FULL_DISK, what, str(source), str(tmp_path / 'out'), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and 'failed' in done.stdout and done.stdout.count('\n') == 1, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())


# A disk of its own in the process's own mount namespace, so that nothing is left of it.
SMALL_DISK = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 && "$@"; status=$?; ls -A "$disk"; exit $status'


@pytest.mark.slow
@pytest.mark.parametrize('kilobytes', [40, 120])  # the checkpoint takes about 300, a slice for transformers 180
@pytest.mark.parametrize('verb', ['import', 'slice --format orbax', 'slice --format hf'])
def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(verb, kilobytes, imported, tmp_path):
    folder, workdir = imported
    disk = tmp_path / 'disk'
    disk.mkdir()
    own = ['--hf', folder, '--checkpoint', disk / 'out'] if verb == 'import' else ['--checkpoint', workdir, '--out', disk / 'out']
    elastic = [sys.executable, '-m', 'elastic_jax', *verb.split(), *own, *(['--budget', 'full'] if verb != 'import' else [])]
    command = ['unshare', '--mount', 'sh', '-c', SMALL_DISK, 'sh', f'{kilobytes}k', disk, *elastic]
    environment = {**os.environ, 'disk': str(disk)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment)
    assert 'mount' not in done.stderr and 'unshare' not in done.stderr, f'{done.stderr}; this test needs root'
    said = [line for line in done.stderr.splitlines() if 'has no tokenizer.json' not in line]
    assert done.returncode == 1 and done.stdout == '', done.stderr[-2000:]
    assert len(said) == 1 and 'no space is left' in said[0], done.stderr[-2000:]


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


def test_hub_id_is_fetched_without_pickles_and_code_and_named_as_the_parent(imported, tmp_path, monkeypatch):
    stored = ('model-00001-of-00002.safetensors', 'config.json', 'tokenizer.json', 'pytorch_model.bin', 'modeling_x.py')

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == 'someone/parent'
        fetched = [file for file in stored if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)]
        assert fetched == list(stored[:3])
        return str(imported[0])

    monkeypatch.setattr('huggingface_hub.snapshot_download', download)
    arch = import_checkpoint('someone/parent', tmp_path / 'work')
    card = (export_checkpoint(tmp_path / 'work', arch, tmp_path / 'out') / 'README.md').read_text()
    assert 'base_model: someone/parent' in card


def test_slice_is_uploaded_whole_to_the_id_that_is_given(imported, tmp_path, monkeypatch):
    uploaded = {}

    class Hub:
        def create_repo(self, name: str, exist_ok: bool) -> str:
            return f'https://hub/{name}'

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            uploaded[repo_id] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr('huggingface_hub.HfApi', Hub)
    command = ['slice', '--checkpoint', str(imported[1]), '--widths', 'mlp=24', '--out', str(tmp_path / 'out')]
    with pytest.raises(UserError, match='add --format hf'):
        run([*command, '--push-to-hub', 'me/small'])
    assert run([*command, '--format', 'hf', '--push-to-hub', 'me/small']) == 0
    wanted = {'model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.json', 'README.md'}
    assert uploaded == {'me/small': wanted}


def test_refused_or_failing_import_leaves_nothing(imported, tmp_path, monkeypatch):
    model = Path(shutil.copytree(imported[0], tmp_path / 'model'))
    config = json.loads((model / 'config.json').read_text())
    (model / 'config.json').write_text(json.dumps(config | {'model_type': 'gpt2'}))
    with pytest.raises(UserError, match='not supported'):
        import_checkpoint(model, tmp_path / 'work')

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        raise UserError(f'{self.path} ends inside {name}')

    monkeypatch.setattr('elastic_jax.hf.safetensors.SafetensorsFile.read', read)  # cut off while it was being read
    with pytest.raises(UserError, match='ends inside'):
        import_checkpoint(imported[0], tmp_path / 'work')
    assert [path.name for path in tmp_path.iterdir()] == ['model']

    tokenizer = tmp_path / 'own' / 'tokenizer'
    tokenizer.mkdir(parents=True)
    shutil.copy(imported[0] / 'tokenizer.json', tokenizer)  # as a killed import leaves it
    with pytest.raises(UserError, match='ends inside'):
        import_checkpoint(imported[0], tmp_path / 'own')
    assert [path.name for path in (tmp_path / 'own').rglob('*')] == ['tokenizer', 'tokenizer.json']
    (tokenizer / 'tokenizer.json').write_text('{"model": {"another": 1}}')
    with pytest.raises(UserError, match='is none of the files of the tokenizer'):
        import_checkpoint(imported[0], tmp_path / 'own')
    assert (tokenizer / 'tokenizer.json').read_text() == '{"model": {"another": 1}}'


def test_import_that_was_killed_can_be_repeated(imported, tmp_path):
    killed = tmp_path / 'work' / 'checkpoints' / '0.orbax-checkpoint-tmp' / 'params.orbax-checkpoint-tmp'
    killed.mkdir(parents=True)
    (killed / 'manifest.ocdbt').write_bytes(b'half')
    arch = import_checkpoint(imported[0], tmp_path / 'work')
    assert equal(restore_slice(tmp_path / 'work', arch), load_params(imported[0]), arch)
    assert [path.name for path in (tmp_path / 'work' / 'checkpoints').iterdir()] == ['0']


def test_tokenizer_that_went_away_is_missed_not_left_out(imported, tmp_path):
    workdir = Path(shutil.copytree(imported[1], tmp_path / 'moved'))
    arch = read_manifest(workdir).arch
    out = export_checkpoint(workdir, arch, tmp_path / 'out')
    assert (out / 'tokenizer.json').exists()
    (workdir / 'tokenizer' / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match='no longer'):
        export_checkpoint(workdir, arch, tmp_path / 'again')
