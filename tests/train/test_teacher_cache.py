"""A cached teacher: files that any process count reads, damage that is said, and training as from the parent itself."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastic_jax.data import teacher
from elastic_jax.data.teacher import TeacherCache, TeacherSpec
from elastic_jax.errors import UserError
from elastic_jax.metrics import read_metrics
from elastic_jax.train import persist
from elastic_jax.train.loop import train
from elastic_jax.train.setup import make_plan
from elastic_jax.train.teacher_cache import as_teacher, cache_teacher, parameters_hash
from tests.train.test_controls import control
from tests.train.tiny_experiment import get_config

SPEC = TeacherSpec({'fingerprint': 'f', 'seed': 0}, 'p', vocab=300, k=3, tail=True, context=4, dtype='float32')


def written(root, batches=5, ranges=((0, 2), (2, 6))):
    """A cache whose values say where they belong: (cache, ids [batches, 6, T, K], log-probabilities [batches, 6, T, K + 1])."""
    cache = TeacherCache(root, SPEC, batches, ranges)
    cache.per_file = 2
    rng = np.random.default_rng(0)
    ids, log_p = rng.integers(0, 300, (batches, 6, 4, 3)), -rng.random((batches, 6, 4, 4)).astype(np.float16)
    cache.begin()
    for group in range(cache.groups):
        own = cache.batches_of(group)
        for first, last in cache.ranges:
            cache.write(group, first, ids[own.start : own.stop, first:last], log_p[own.start : own.stop, first:last])
    return cache, ids, log_p


def test_processes_of_any_number_read_what_others_wrote(tmp_path):
    cache, ids, log_p = written(tmp_path)
    for rows in ([0, 1, 2], [3, 4, 5], [1, 4], list(range(6))):
        for batch in range(5):
            found = cache.rows(batch, np.asarray(rows))
            np.testing.assert_array_equal(found['teacher_ids'], ids[batch, rows])
            np.testing.assert_array_equal(found['teacher_log_p'], log_p[batch, rows])
    stored = sum(path.stat().length for path in cache.folder.iterdir() if path.suffix == '.bin')
    assert stored == 5 * 6 * 4 * SPEC.bytes_per_token + 4 * 6  # and a checksum for each of six files
    assert SPEC.bytes_per_token == 3 * 2 + 4 * 2


def test_what_is_not_there_not_finished_too_short_or_damaged_is_said(tmp_path):
    with pytest.raises(UserError, match=r'no teacher cached for this text.* run elastic cache-teacher'):
        TeacherCache.open(tmp_path, SPEC, 5)
    cache, _, _ = written(tmp_path)
    with pytest.raises(UserError, match='is not finished'):
        TeacherCache.open(tmp_path, SPEC, 5)
    cache.finish()
    with pytest.raises(UserError, match='holds 5 batches, but 6 are needed'):
        TeacherCache.open(tmp_path, SPEC, 6)
    path = next(path for path in cache.folder.iterdir() if path.suffix == '.bin')
    raw = bytearray(path.read_bytes())
    raw[7] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError, match=r'\.bin is damaged'):
        for batch in range(5):
            cache.rows(batch, np.arange(6))
    assert dataclasses.replace(SPEC, dtype='bfloat16').name != SPEC.name
    path.write_bytes(bytes(raw[:-9]))
    (cache.folder / 'index.json').write_text('{"bat')
    with pytest.raises(UserError, match=r'index\.json is damaged .*; remove .* and run elastic cache-teacher'):
        TeacherCache.open(tmp_path, SPEC, 5)
    assert sum(not cache.has(group, *own) for group in range(3) for own in cache.ranges) == 1


def test_a_complete_cache_that_is_being_lengthened_is_not_complete(tmp_path):
    written(tmp_path)[0].finish()
    longer = TeacherCache(tmp_path, SPEC, 9, ((0, 2), (2, 6)))
    longer.begin()  # and killed before the first file
    with pytest.raises(UserError, match='is not finished'):
        TeacherCache.open(tmp_path, SPEC, 9)


def test_going_on_with_other_processes_takes_no_file_for_one_of_other_rows(tmp_path, monkeypatch):
    """Half the rows in twice the batches are as many bytes: files of the one must not be read as the other's."""
    monkeypatch.setattr(teacher, 'FILE_BYTES', 4 * SPEC.bytes_of(1, 1))
    rng = np.random.default_rng(0)
    ids, log_p = rng.integers(0, 300, (8, 2, 4, 3)), -rng.random((8, 2, 4, 4)).astype(np.float16)

    def fill(cache, groups):
        cache.begin()
        for group in groups:
            own = slice(cache.batches_of(group).start, cache.batches_of(group).stop)
            for first, last in cache.ranges:
                if not cache.has(group, first, last):
                    cache.write(group, first, ids[own, first:last], log_p[own, first:last])

    alone = TeacherCache(tmp_path, SPEC, 8, ((0, 2),))
    fill(alone, range(1))
    fill(alone, range(0))  # the same once more: what is there is kept
    assert alone.has(0, 0, 2)
    two = TeacherCache(tmp_path, SPEC, 8, ((0, 1), (1, 2)))
    assert two.spec.bytes_of(two.per_file, 1) == alone.spec.bytes_of(alone.per_file, 2)
    fill(two, range(two.groups))
    two.finish()
    found = TeacherCache.open(tmp_path, SPEC, 8)
    for batch in range(8):
        np.testing.assert_array_equal(found.rows(batch, np.arange(2))['teacher_ids'], ids[batch])
        np.testing.assert_array_equal(found.rows(batch, np.arange(2))['teacher_log_p'], log_p[batch])


def test_a_cached_teacher_in_bfloat16_is_the_frozen_one(tmp_path):
    """Decays, gates and biases stay float32 in the parent that training pins; a cache must not round them either."""
    config = get_config('by_hand')
    config.dtype = 'bfloat16'
    plan = make_plan(config)
    place = plan.place()
    store, params = persist.Store(epath.Path(tmp_path), plan, place), persist.initial_params(plan, place)
    store.save_parent(params, plan.parent, {})
    frozen, cached = store.restore_parent(), as_teacher(params, plan, place)
    store.close()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {'bfloat16', 'float32'}
    same = jax.tree.map(lambda one, other: one.dtype == other.dtype and bool((one == other).all()), frozen, cached)
    assert jax.tree.all(same), same


def test_the_hash_of_parameters_is_of_their_bits_and_of_no_mesh():
    params = {'a': {'w': np.arange(64, dtype=np.float32).reshape(8, 8)}, 'b': {'w': np.ones((8, 2), np.float32)}}
    mesh = Mesh(np.asarray(jax.devices()[:4]), ('fsdp',))
    sharded = jax.device_put(params, NamedSharding(mesh, PartitionSpec('fsdp')))
    assert parameters_hash(params) == parameters_hash(sharded)
    hashes = {parameters_hash(params)}
    for change in ([0, 0, 1e-30], [7, 7, np.nextafter(np.float32(63), np.float32(0))]):
        other = jax.tree.map(np.copy, params)
        other['a']['w'][int(change[0]), int(change[1])] = change[2]
        hashes.add(parameters_hash(other))
    swapped = jax.tree.map(np.copy, params)
    swapped['a']['w'][[0, 1]] = swapped['a']['w'][[1, 0]]
    assert len(hashes | {parameters_hash(swapped)}) == 4


def cached_config(parent, root, **cache):
    config = control(parent, optimizer={'lr': 1e-3, 'final_lr': 1e-3}, stages={})
    config.teacher_cache.update({'path': str(root), 'k': 264, **cache})
    config.stages.short.update({'steps': 4, 'probabilities': {}})
    return config


def test_training_from_the_cache_is_training_from_the_parent_without_it(parent, tmp_path, monkeypatch):
    root = tmp_path / 'teacher'
    config = cached_config(parent, root)
    train(config, tmp_path / 'frozen')
    (cache,) = cache_teacher(cached_config(parent, root), lambda line: None)
    # A file cut off by a kill is written again, to the same bytes.
    path = next(path for path in cache.folder.iterdir() if path.suffix == '.bin')
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    (cache.folder / 'complete.json').unlink()
    cache_teacher(cached_config(parent, root), lambda line: None)
    assert path.read_bytes() == whole

    loads = []
    restore = persist.Store.restore_parent
    monkeypatch.setattr(persist.Store, 'restore_parent', lambda store: loads.append(store.manager.steps()) or restore(store))
    config = cached_config(parent, root)
    config.teacher = 'cached'
    train(config, tmp_path / 'cached')
    losses = [
        [line['loss'] for line in read_metrics(tmp_path / name) if line['kind'] == 'train'] for name in ('frozen', 'cached')
    ]
    assert len(losses[0]) == 4 and losses[0][1] > 0
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3, atol=1e-6)
    assert len(loads) == 1, 'the parent is read for the final table only'


def test_a_cache_of_other_text_order_or_parent_is_not_taken(parent, tmp_path):
    config = cached_config(parent, tmp_path, k=4)
    config.teacher = 'cached'
    with pytest.raises(UserError, match='no teacher cached for this text, order, parent and k'):
        train(config, tmp_path / 'run')
    config.parent.checkpoint = ''
    config.curriculum = ('pretrain', 'short')
    with pytest.raises(UserError, match=r"config\.teacher='cached' needs config\.parent\.checkpoint"):
        make_plan(config)


@pytest.mark.slow
def test_a_mesh_writes_what_one_device_writes(parent, tmp_path):
    found = []
    for mesh in ({'fsdp': 1}, {'fsdp': 2, 'tensor': 2}):
        config = cached_config(parent, tmp_path / str(mesh['fsdp']), k=5)
        config.layout.update({'mlp': 2, 'kv_heads': 2})
        config.mesh.update(mesh)
        (cache,) = cache_teacher(config, lambda line: None)
        rows = [cache.rows(batch, np.arange(4)) for batch in range(4)]
        found.append({key: np.stack([row[key] for row in rows]) for key in rows[0]})
    one, many = found
    np.testing.assert_allclose(many['teacher_log_p'].astype(np.float32), one['teacher_log_p'].astype(np.float32), atol=4e-3)
    assert (many['teacher_ids'] == one['teacher_ids']).mean() > 0.99  # but for near-ties
