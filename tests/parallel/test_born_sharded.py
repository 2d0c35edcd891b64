"""Parameters, optimiser and teacher are made where they live: no device, and so no host, ever has more than its part of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.model.params import init_params, leaves, param_table
from elastic_jax.nest.relayout import relayout
from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.sharding import spec_axes
from elastic_jax.plan.chips import topology_devices
from elastic_jax.train.setup import make_plan
from elastic_jax.train.state import new_state
from experiments.star_elastic_nano_v3 import get_config as star_config
from tests.parallel.meshes import LAYOUT, MESHES, mesh_of
from tests.tiny import HYBRID
from tests.train.tiny_experiment import get_config

OPTIMIZER = make_plan(get_config('by_hand')).optimizer


def own_bytes(place):
    """Bytes of one device's part of the float32 parameters: what the sizes of the mesh axes that split each leave of it."""
    total = 0
    for group, name, param in leaves(param_table(place.parent, place.layout)):
        spec = place.specs[group][name]
        parts = math.prod(place.mesh.shape[axis] for dim in range(len(spec)) for axis in spec_axes(spec, dim))
        total += 4 * math.prod(param.shape) // parts
    return total


def whole_bytes(place):
    return sum(4 * math.prod(param.shape) for _, _, param in leaves(param_table(place.parent, place.layout)))


@pytest.mark.parametrize('name', ['fsdp', 'fsdp-expert', 'all'])
def test_initialisation_makes_on_each_device_its_own_part(name):
    place = Placement(mesh_of(name), HYBRID, LAYOUT)
    build = lambda key: init_params(key, HYBRID, LAYOUT)
    key = jax.random.key(0)
    program = jax.jit(build, out_shardings=place.shardings(jax.eval_shape(build, key))).lower(key).compile()
    memory, largest = program.memory_analysis(), max(4 * math.prod(p.shape) for _, _, p in leaves(param_table(HYBRID, LAYOUT)))
    assert memory.output_size_in_bytes == pytest.approx(own_bytes(place), rel=0.02)
    # Beside its part a device needs the temporaries of a few leaves, never of the whole.
    assert memory.temp_size_in_bytes < min(4 * largest, whole_bytes(place) / 2)
    params = place.make(build, key)
    for leaf in jax.tree.leaves(params):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {leaf.sharding.shard_shape(leaf.shape)}
    # And the numbers are those of one device.
    close = lambda found, expected: np.testing.assert_allclose(found, expected, rtol=1e-6)
    jax.tree.map(close, jax.device_get(params), jax.device_get(jax.jit(build)(key)))


@pytest.mark.parametrize('name', MESHES)
def test_moments_and_master_weights_are_split_like_their_parameters(name):
    place = Placement(mesh_of(name), HYBRID, LAYOUT)
    optimizer = OPTIMIZER(make_plan(get_config('by_hand')).stages[1])
    state = place.abstract(jax.eval_shape(lambda: new_state(init_params(jax.random.key(0), HYBRID, LAYOUT), optimizer)))
    wanted = {path: leaf.sharding for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    copies = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if (own := path[-2:]) in wanted and leaf.ndim:
            assert leaf.sharding == wanted[own], path
            copies += 1
    assert copies == 3 * len(wanted)
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(state))
    assert held == pytest.approx(3 * own_bytes(place), rel=0.02)


def test_the_30b_parent_is_split_over_all_its_chips_but_the_replicas():
    place = make_plan(star_config(), elsewhere=True).place(topology_devices('v5p:8x8x4').devices)
    assert place.mesh.shape['fsdp'] * place.mesh.shape['replica'] == 256
    # What is whole everywhere (vectors over embed, biases of experts) is nothing beside it.
    assert own_bytes(place) == pytest.approx(whole_bytes(place) / place.mesh.shape['fsdp'], rel=5e-3)


def test_relaying_parameters_leaves_each_device_its_own_part():
    place = Placement(mesh_of('fsdp'), HYBRID, LAYOUT)
    flat = Placement(mesh_of('fsdp'), HYBRID, type(LAYOUT)())
    params = flat.make(lambda key: init_params(key, HYBRID), jax.random.key(0))
    moved = place.make(lambda p: relayout(p, HYBRID, flat.layout, LAYOUT), params)
    for leaf in jax.tree.leaves(moved):
        assert {shard.data.shape for shard in leaf.addressable_shards} == {leaf.sharding.shard_shape(leaf.shape)}


def test_each_process_makes_only_its_own_rows_of_a_batch():
    place = Placement(mesh_of('all'), HYBRID, LAYOUT)
    batch = place.put_whole_batch({'tokens': np.arange(32, dtype=np.int32).reshape(8, 4)})
    assert {shard.data.shape for shard in batch['tokens'].addressable_shards} == {(2, 4)}
    assert place.rows(8) == ((0, 8),)  # the one process here has all devices
    assert jnp.array_equal(batch['tokens'], jnp.arange(32).reshape(8, 4))
