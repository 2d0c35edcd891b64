"""slice_params: the leading corner of every parameter, of arrays, abstract arrays and shardings alike (invariant 3)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from elastic_jax.errors import UserError
from elastic_jax.layout import FLAT, Layout, to_ranked
from elastic_jax.model.params import abstract_params
from elastic_jax.nest.slice import insert_params, slice_params
from tests.strategies import narrowings
from tests.tiny import FAMILIES, GROUPED_MOE, HYBRID, LLAMA, OPTIONS, QWEN_MOE, numpy_params

BLOCKED = Layout(mlp=2, shared_width=4, experts=2, kv_heads=2)

# For each axis: a narrowing, and which dimension of which parameters (by block letter and name) it shortens, to what.
# Written out by hand from method.md §2, so that a wrong axis name in the table shows.
MAMBA_IN, SHARED = ('z', 'x', 'b', 'c', 'dt'), ('shared_up', 'shared_down')
EXPECTED = {
    ('embed', 24): {
        'M': {**dict.fromkeys(MAMBA_IN, 0), 'out': 3, 'norm': 0},
        'E': {'router': 0, 'expert_up': 3, 'expert_down': 3, 'shared_up': 0, 'shared_down': 2, 'norm': 0},
        '*': {'q': 0, 'k': 0, 'v': 0, 'o': 4, 'norm': 0},
        '-': {'up': 0, 'down': 2, 'norm': 0},
    },
    ('mamba_heads', 4): {
        'M': {'z': 2, 'x': 2, 'dt': 2, 'conv_x': 2, 'conv_x_bias': 1, 'a_log': 1, 'd': 1, 'dt_bias': 1, 'gated_norm': 1, 'out': 1}
    },
    ('mamba_head_dim', 3): {'M': {'z': 3, 'x': 3, 'conv_x': 3, 'conv_x_bias': 2, 'gated_norm': 2, 'out': 2}},
    ('query_heads', 1): {'*': {'q': 3, 'o': 2}},
    ('kv_heads', 2): {'*': {'q': 2, 'k': 2, 'v': 2, 'o': 1}},
    ('mlp', 16): {'-': {'up': 2, 'down': 1}},
    ('experts', 6): {'E': {'router': 2, 'correction_bias': 1, 'expert_up': 1, 'expert_down': 1}},
    ('expert_width', 5): {'E': {'expert_up': 2, 'expert_down': 2}},
    ('shared_width', 8): {'E': {'shared_up': 2, 'shared_down': 1}},
}


@pytest.mark.parametrize(('axis', 'width'), EXPECTED, ids=[axis for axis, _ in EXPECTED])
def test_an_axis_shortens_exactly_the_dimensions_that_carry_it(axis, width):
    params, child = numpy_params(HYBRID), HYBRID.narrow({axis: width})
    sliced = slice_params(params, HYBRID, child)
    size = width // 2 if axis == 'mamba_heads' else width
    whole = {('embedding', 'table'): 1, ('unembed', 'kernel'): 0, ('final_norm', 'norm'): 0} if axis == 'embed' else {}
    for group, leaves in params.items():
        for name, leaf in leaves.items():
            if group.startswith('layer_'):
                dimension = EXPECTED[axis, width].get(HYBRID.pattern[int(group[-3:])], {}).get(name)
            else:
                dimension = whole.get((group, name))
            expected = leaf if dimension is None else leaf.take(range(size), dimension)
            np.testing.assert_array_equal(sliced[group][name], expected, err_msg=f'{group}/{name}')


def test_dropped_blocks_have_no_parameters():
    child = HYBRID.narrow(layers=3)
    assert set(slice_params(numpy_params(HYBRID), HYBRID, child)) == {
        'embedding', 'layer_000', 'layer_001', 'layer_002', 'final_norm', 'unembed',
    }  # fmt: skip


def test_a_blocked_slice_keeps_the_first_ranks():
    params, child = numpy_params(HYBRID, BLOCKED), HYBRID.narrow(mlp=16, kv_heads=2, shared_width=12)
    sliced = slice_params(params, HYBRID, child, BLOCKED)
    ranked = lambda tree, block, name, axis: to_ranked(tree[f'layer_00{block}'][name], axis)
    for block, name, axis, size in (
        (3, 'up', 1, 16),
        (3, 'down', 0, 16),
        (2, 'q', 1, 2),
        (2, 'o', 0, 2),
        (1, 'shared_up', 1, 12),
    ):
        full = ranked(params, block, name, axis)
        np.testing.assert_array_equal(ranked(sliced, block, name, axis), full.take(range(size), axis))


def chains(arch, layout):
    """(mid, small): small nests in mid, which nests in arch."""
    return narrowings(arch, layout).flatmap(
        lambda outer: narrowings(arch.narrow(outer), layout).map(
            lambda inner: (arch.narrow(outer), arch.narrow(outer).narrow(inner))
        )
    )


@settings(max_examples=100)
@given(st.sampled_from([*((arch, FLAT) for arch in FAMILIES.values()), (HYBRID, BLOCKED), (OPTIONS, BLOCKED)]), st.data())
def test_submodels_nest_element_by_element(case, data):
    arch, layout = case
    mid, small = data.draw(chains(arch, layout))
    # Every element its own value, so that equal values are the same element.
    sizes = iter(range(0, 1 << 40, 1 << 20))
    number = lambda s: next(sizes) + np.arange(math.prod(s.shape)).reshape(s.shape)
    full_params = jax.tree.map(number, abstract_params(arch, layout))
    mid_params = slice_params(full_params, arch, mid, layout)
    direct = slice_params(full_params, arch, small, layout)
    through = slice_params(mid_params, mid, small, layout)
    jax.tree.map(np.testing.assert_array_equal, through, direct)
    jax.tree.map(lambda leaf, shape: np.testing.assert_equal(leaf.shape, shape.shape), direct, abstract_params(small, layout))
    for group, leaves in direct.items():
        for name, leaf in leaves.items():
            index = np.indices(leaf.shape)
            np.testing.assert_array_equal(leaf, mid_params[group][name][tuple(index)])
            np.testing.assert_array_equal(leaf, full_params[group][name][tuple(index)])


@pytest.mark.parametrize('arch', [HYBRID, GROUPED_MOE, LLAMA, QWEN_MOE], ids=['hybrid', 'grouped_moe', 'llama', 'qwen_moe'])
def test_gradients_land_in_the_corner_and_are_zero_elsewhere(arch):
    child = arch.narrow({'embed': 24, 'query_heads': 1, 'layers': arch.layers - 1})
    params = jax.tree.map(jnp.asarray, numpy_params(arch))
    weights = numpy_params(child, seed=1)

    def weighted(params):
        return sum(
            jax.tree.leaves(jax.tree.map(lambda leaf, weight: jnp.vdot(leaf, weight), slice_params(params, arch, child), weights))
        )

    gradients = jax.jit(jax.grad(weighted))(params)
    for group, leaves in gradients.items():
        for name, gradient in leaves.items():
            expected = np.zeros(gradient.shape, np.float32)
            if group in weights:
                corner = weights[group][name]
                expected[tuple(slice(size) for size in corner.shape)] = corner
            np.testing.assert_array_equal(gradient, expected, err_msg=f'{group}/{name}')


def test_abstract_arrays_keep_dtype_and_sharding_and_shardings_stay():
    mesh = jax.make_mesh((1,), ('tensor',), axis_types=(jax.sharding.AxisType.Auto,))
    child = HYBRID.narrow(embed=24, mlp=16)
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, PartitionSpec(*[None] * len(s.shape))), abstract_params(HYBRID, BLOCKED)
    )
    abstract = jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        abstract_params(HYBRID, BLOCKED, jnp.bfloat16),
        shardings,
    )
    sliced = slice_params(abstract, HYBRID, child, BLOCKED)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), sliced) == jax.tree.map(
        lambda s: (s.shape, s.dtype), abstract_params(child, BLOCKED, jnp.bfloat16)
    )
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(sliced))
    assert slice_params(shardings, HYBRID, child, BLOCKED) == {
        group: {name: shardings[group][name] for name in leaves} for group, leaves in sliced.items()
    }


def test_what_does_not_fit_is_refused():
    params, child = numpy_params(HYBRID), HYBRID.narrow(embed=24)
    with pytest.raises(UserError, match=r'embed=32 does not nest: the parent has 24'):
        slice_params(params, child, HYBRID)
    with pytest.raises(UserError, match=r"mlp@3=30 is not a multiple of the layout's G=4"):
        slice_params(numpy_params(HYBRID, Layout(mlp=4)), HYBRID, HYBRID.narrow(mlp=30), Layout(mlp=4))
    with pytest.raises(UserError, match=r'parameter layer_003/up has shape \(32, 1, 48\), but the parent declares \(32, 2, 24\)'):
        slice_params(params, HYBRID, child, Layout(mlp=2))
    # Also where the slice would have fitted.
    params['layer_003']['up'] = params['layer_003']['up'][:, :, :40]
    with pytest.raises(UserError, match=r'layer_003/up has shape \(32, 1, 40\)'):
        slice_params(params, HYBRID, HYBRID.narrow(mlp=16))


@pytest.mark.parametrize('name', FAMILIES)
def test_inserting_is_the_inverse_of_slicing_and_leaves_the_rest(name):
    parent = FAMILIES[name]
    child = parent.narrow(embed=parent.embed // 2)
    params, own = numpy_params(parent, seed=1), numpy_params(child, seed=2)
    inserted = insert_params(jax.tree.map(jnp.asarray, params), own, parent, child)
    jax.tree.map(np.testing.assert_array_equal, slice_params(inserted, parent, child), own)
    for (path, before), after in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(inserted), strict=True):
        group, leaf = path[0].key, path[1].key
        outside = np.ones(before.shape, bool)
        if leaf in own.get(group, {}):
            outside[tuple(slice(size) for size in own[group][leaf].shape)] = False
        np.testing.assert_array_equal(np.asarray(after)[outside], before[outside])
