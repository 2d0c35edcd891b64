"""The mesh and what is checked when a run starts: sizes filled in, and every refusal with a fix that works."""

import math
import re

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax.errors import UserError
from elastic_jax.layout import Layout
from elastic_jax.parallel.mesh import AXES, make_mesh, mesh_sizes
from elastic_jax.parallel.sharding import RULES, mesh_problems
from elastic_jax.plan.chips import topology_devices
from elastic_jax.train.setup import make_plan
from tests.parallel.meshes import LAYOUT
from tests.tiny import HYBRID, LLAMA
from tests.train.tiny_experiment import get_config

factors = st.integers(0, 3).map(lambda n: 2**n)


@given(st.lists(factors, min_size=4, max_size=4), st.sampled_from(AXES))
def test_the_size_left_open_takes_all_remaining_devices(sizes, name):
    given_sizes, devices = dict(zip(AXES, sizes, strict=True)), math.prod(sizes)
    assert mesh_sizes(given_sizes | {name: -1}, devices) == given_sizes
    assert mesh_sizes(given_sizes, devices) == given_sizes
    assert math.prod(mesh_sizes({name: -1}, devices).values()) == devices


@pytest.mark.parametrize(
    ('sizes', 'devices', 'sentence'),
    [
        ({'fsdq': 8}, 8, "did you mean 'fsdp'"),
        ({'fsdp': -1, 'tensor': -1}, 8, 'give all sizes but one'),
        ({'fsdp': 0}, 8, 'config.mesh.fsdp=0; give a positive size, or -1'),
        ({'fsdp': -1, 'tensor': 3}, 8, 'does not fit 8 devices; give a product that divides 8'),
        ({'fsdp': 16}, 8, 'give sizes whose product is 8, or one of them as -1'),
    ],
)
def test_what_does_not_fit_the_devices_is_one_sentence(sizes, devices, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        mesh_sizes(sizes, devices)


def test_every_mesh_axis_splits_something_and_no_other_is_named():
    rules = {name: axes for name, axes in vars(RULES).items() if name != 'stored'} | dict(RULES.stored)
    named = {axis for axes in rules.values() for axis in axes}
    assert named == set(AXES)


PROBLEMS = [
    (HYBRID, LAYOUT, {'tensor': 8}, 'tensor=8 does not divide the G=4 blocks of mlp'),
    (HYBRID, Layout(mlp=8, shared_width=8, experts=2), {'expert': 8}, 'expert=8 does not divide the G=2 blocks of experts'),
    (HYBRID.narrow(embed=20), LAYOUT, {'fsdp': 8}, 'embed=20 does not split over fsdp=8; take config.mesh.fsdp=5'),
    (LLAMA, LAYOUT, {'fsdp': 4, 'expert': 2}, 'config.mesh.expert=2, but the model has no experts; use fsdp instead'),
]


@pytest.mark.parametrize(
    ('arch', 'layout', 'sizes', 'sentence'), PROBLEMS, ids=lambda value: value if isinstance(value, str) else ''
)
def test_what_does_not_split_over_the_mesh_is_said_with_a_fix_that_works(arch, layout, sizes, sentence):
    problems = mesh_problems(arch, layout, make_mesh(sizes))
    assert any(sentence in problem for problem in problems), problems
    fixed_sizes, fixed_layout = dict(sizes), vars(layout).copy()
    for problem in problems:
        if found := re.search(r'config\.layout\.(\w+) to a multiple of (\d+)', problem):
            fixed_layout[found[1]] = int(found[2])
        elif found := re.search(r'take config\.mesh\.(\w+)=(\d+)', problem):
            fixed_sizes[found[1]] = int(found[2])
        else:
            fixed_sizes['expert'] = 1
    assert mesh_problems(arch, Layout(**fixed_layout), make_mesh(fixed_sizes)) == []


def test_all_that_does_not_fit_a_run_is_said_at_its_start():
    config = get_config('by_hand')
    config.mesh.update({'fsdp': -1, 'tensor': 2})
    plan = make_plan(config)
    with pytest.raises(UserError) as refused:
        plan.place(jax.devices())
    for sentence in (
        'set config.layout.mlp to a multiple of 2',
        'stages.short.batch_size=4 does not split over 4 devices in 2 micro-batches; take a multiple of 8, such as 8',
        'stages.long.batch_size=2 does not split over 4 devices; take a multiple of 4, such as 4',
    ):
        assert sentence in str(refused.value)


def test_a_width_that_breaks_the_layout_is_refused_with_the_nearest_that_do_not():
    config = get_config('by_hand')
    config.layout.mlp = 8
    config.widths.small = 'embed=8,mlp=12'
    with pytest.raises(UserError, match=r'mlp@3=12 is not a multiple of the layout.s G=8; take 8 or 16'):
        make_plan(config)


@pytest.fixture(scope='module')
def two_slices():
    """Sixteen chips on two slices, as their compiler knows them."""
    topology_devices('v5p:2x2x2')  # sets up the compiler
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform='tpu', topology_name='v5p:2x2x2', num_slices=2).devices


def test_replicas_are_across_slices_and_all_else_within_one(two_slices):
    mesh = make_mesh({'replica': 2, 'fsdp': 4, 'tensor': 2}, two_slices)
    for replica in mesh.devices:
        assert len({device.slice_index for device in replica.flat}) == 1
    assert len({device.id for device in mesh.devices.flat}) == 16


def test_parameters_are_not_split_across_slices(two_slices):
    with pytest.raises(UserError, match=r'config.mesh.replica=1 does not split over 2 slices; take a multiple of 2'):
        make_mesh({'fsdp': -1}, two_slices)
