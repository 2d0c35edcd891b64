"""Checkpoints on a real disk: slices read from them, damage noticed, the good ones kept."""

import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.checkpoint.chunks import chunk_shape
from elastic_jax.checkpoint.manager import CheckpointManager
from elastic_jax.checkpoint.manifest import Budget, Manifest
from elastic_jax.checkpoint.restore import read_manifest, restore_slice
from elastic_jax.cost import cost_of
from elastic_jax.errors import UserError
from elastic_jax.layout import FLAT
from elastic_jax.nest.slice import slice_params
from elastic_jax.train.persist import Store
from elastic_jax.train.setup import make_plan
from tests.nest.test_masks import BLOCKED, HYBRID_CASES
from tests.tiny import HYBRID, numpy_params
from tests.train.tiny_experiment import get_config


def make_manifest(layout=FLAT, step=1) -> Manifest:
    budgets = {
        name: Budget(arch, cost_of(arch).to_json(), {'loss': 1.5})
        for name, arch in (('full', HYBRID), ('alpha', HYBRID.narrow(embed=24, layers=4)))
    }
    return Manifest(
        arch=HYBRID, layout=layout, budgets=budgets, step=step, stage='short', stage_step=0, rng=[0],
        dtypes={'params': 'float32'}, tokenizer={'kind': 'bytes'}, hf_config=None,
        data_fingerprint='f', ordering_hash='o', experiment='test',
    )  # fmt: skip


def save(workdir, params, layout=FLAT, steps=(1,), keep=2):
    manager = CheckpointManager(workdir, keep)
    for step in steps:
        rest = {'opt_state': {'mu': np.full(3, step)}, 'router': {}, 'ordering': {'embedding': {'embed': np.arange(3)}}}
        manager.save(step, params=params, **rest, data={'next_batch': step}, manifest=make_manifest(layout, step))
    manager.wait()
    manager.close()


@pytest.fixture(scope='module', params=[FLAT, BLOCKED], ids=['flat', 'blocked'])
def saved(request, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('saved')
    params = numpy_params(HYBRID, request.param, 0)
    save(workdir, params, request.param)
    return workdir, params, request.param


@pytest.mark.parametrize('widths', HYBRID_CASES, ids=str)
def test_a_restored_slice_is_the_slice_of_the_whole(saved, widths):
    workdir, params, layout = saved
    child = HYBRID.narrow(widths)
    restored = restore_slice(workdir, child)
    jax.tree.map(np.testing.assert_array_equal, restored, slice_params(params, HYBRID, child, layout))


def test_a_slice_can_be_cast_as_it_is_read(saved):
    workdir, params, layout = saved
    child = HYBRID.narrow(embed=24, mlp=32)
    restored, expected = restore_slice(workdir, child, dtype=jnp.bfloat16), slice_params(params, HYBRID, child, layout)
    np.testing.assert_array_equal(restored['layer_003']['up'], expected['layer_003']['up'].astype(jnp.bfloat16))
    assert restored['layer_000']['a_log'].dtype == jnp.float32


def test_what_does_not_nest_or_breaks_the_layout_is_refused(saved):
    workdir, _, layout = saved
    larger = dataclasses.replace(HYBRID, embed=64)
    with pytest.raises(UserError, match='embed=64 does not nest: the parent has 32'):
        restore_slice(workdir, larger)
    if layout == BLOCKED:
        with pytest.raises(UserError, match='mlp@3=33 is not a multiple'):
            restore_slice(workdir, HYBRID.narrow(mlp=33))


def test_a_manifest_comes_back_and_its_budgets_keep_their_order(saved):
    workdir, _, layout = saved
    assert read_manifest(workdir) == make_manifest(layout)
    assert list(read_manifest(workdir).budgets) == ['full', 'alpha']


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda text: text.replace('"embed": 32', '"embed": 16'), 'edited or damaged'),
        (lambda text: text[: len(text) // 2], 'is not JSON'),
        (lambda text: text.replace('"format_version": 2', '"format_version": 9'), 'format version 9.*update'),
        (lambda text: text.replace('"format_version": 2', '"format_version": 1'), 'format version 1.*write it again'),
        (lambda text: None, 'has no manifest'),
        (lambda text: 'null', 'holds None, not an object'),
        (lambda text: '3', 'holds 3, not an object'),
    ],
    ids=['edited', 'truncated', 'later', 'earlier', 'gone', 'null', 'number'],
)
def test_a_damaged_manifest_is_said(saved, tmp_path, damage, message):
    shutil.copytree(saved[0], tmp_path / 'copy')
    path = tmp_path / 'copy' / 'checkpoints' / '1' / 'manifest' / 'metadata'
    text = damage(path.read_text())
    path.write_text(text) if text is not None else path.unlink()
    with pytest.raises(UserError, match=message):
        read_manifest(tmp_path / 'copy')


def test_keep_policy_keeps_the_newest_and_never_the_pinned_parent(tmp_path):
    params = numpy_params(HYBRID, FLAT, 0)
    manager = CheckpointManager(tmp_path, 2)
    manager.save_parent(params, make_manifest())
    manager.close()
    save(tmp_path, params, steps=(1, 2, 3, 4))
    assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['3', '4']
    manager = CheckpointManager(tmp_path, 2)
    jax.tree.map(np.testing.assert_array_equal, manager.restore_parent(params), params)
    items = manager.restore(4, {'params': params, 'opt_state': None, 'router': {}, 'ordering': None})
    assert items['data'] == {'next_batch': 4} and items['router'] == {} and items['opt_state']['mu'].tolist() == [4, 4, 4]
    with pytest.raises(UserError, match=r'opt_state: mu has shape \(3,\), expected \(4,\)'):
        manager.restore(4, {'opt_state': {'mu': jax.ShapeDtypeStruct((4,), np.float32)}})
    with pytest.raises(UserError, match='lacks nu'):
        manager.restore(4, {'opt_state': {'nu': jax.ShapeDtypeStruct((3,), np.float32)}})
    manager.close()


def largest_file(folder):
    return max((path for path in folder.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize('item', ['params', 'opt_state', 'data', 'manifest'])
@pytest.mark.parametrize('how', ['truncated', 'deleted'])
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(finished_run, tmp_path, item, how):
    """The two checkpoints that the tiny run kept: the newest is damaged, then both are."""
    shutil.copytree(finished_run, tmp_path / 'run')
    steps = sorted((int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir()), reverse=True)

    def damage(step):
        folder = tmp_path / 'run' / 'checkpoints' / str(step) / item
        path = folder / 'metadata' if (folder / 'metadata').exists() else largest_file(folder)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]) if how == 'truncated' else path.unlink()

    plan = make_plan(get_config())
    store = Store(tmp_path / 'run', plan, plan.place())
    said: list[str] = []
    assert store.restore_newest(said.append).step == steps[0]
    damage(steps[0])
    assert store.restore_newest(said.append).step == steps[1]
    assert len(said) == 1 and f'checkpoint {steps[0]} is damaged and passed over' in said[0]
    damage(steps[1])
    with pytest.raises(UserError, match=r'no checkpoint in .* is good'):
        store.restore_newest(said.append)
    store.close()


@pytest.mark.parametrize('width', [1033, 1024, 1037])
def test_no_width_makes_chunks_that_fit_into_the_index(width):
    """OCDBT keeps values of up to 1 KB in its index, here of bfloat16; 1033 is prime, and chunks divide what they cut."""
    shape = (4, 4, 2048, width)
    chunk = chunk_shape(('experts_blocks', 'experts', 'embed', 'expert_width'), shape, shape)
    assert 1024 < 2 * math.prod(chunk) <= 2**16 and all(size % edge == 0 for size, edge in zip(shape, chunk, strict=True))
