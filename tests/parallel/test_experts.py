"""Experts split over devices: nothing is dropped whatever the routing, in every form of the grouped matmul, on one reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from elastic_jax.arch import Arch, MoE
from elastic_jax.layout import Layout
from elastic_jax.model import grouped
from elastic_jax.model.context import Context
from elastic_jax.model.fetch import Summed
from elastic_jax.model.kernels import ANYWHERE, Target
from elastic_jax.model.moe import moe
from elastic_jax.model.params import param_table
from elastic_jax.parallel.mesh import make_mesh
from elastic_jax.parallel.sharding import batch_spec, fetch_ways, param_spec, shards, spec_axes
from tests.model import oracle
from tests.tiny import numpy_params

MIXER = MoE(experts=8, expert_width=6, top_k=2, shared_width=8, scale=1.5)
ARCH, LAYOUT = Arch.from_pattern('E', vocab=4, embed=8, moe=MIXER), Layout(experts=4, shared_width=2)
ROUTINGS = {
    'random': np.zeros(8),
    'all to two on one device': np.asarray([9.0, 9, 0, 0, 0, 0, 0, 0]),
    'all to two on two devices': np.asarray([9.0, 0, 0, 0, 0, 9, 0, 0]),
}


def layer_with(preference):
    """Parameters whose correction bias sends the tokens to the experts that are preferred, in blocked order."""
    layer = numpy_params(ARCH, LAYOUT)['layer_000']
    return layer | {'correction_bias': preference.reshape(4, 2).astype(np.float32)}


def on_mesh(mesh, target=ANYWHERE):
    """The mixer as the training step runs it: manual over the mesh, weights stored as the rules say and whole along embed."""
    table = param_table(ARCH, LAYOUT)['layer_000']
    specs = {name: param_spec(param, mesh) for name, param in table.items()}
    computed = {}
    for name, spec in specs.items():
        fetched = {axis for way in fetch_ways(table[name], spec) for axis in way.axes}
        left = [tuple(axis for axis in spec_axes(spec, dim) if axis not in fetched) or None for dim in range(len(spec))]
        computed[name] = PartitionSpec(*left)
    context = Context(None, shards=shards(ARCH, LAYOUT, mesh), target=target)
    rows = batch_spec(mesh)

    def run(layer, x):
        mixed = moe(layer, x, MIXER, context, None)
        return mixed.y_BxTxD, mixed.aux['expert_load']

    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(computed, rows), out_specs=(rows, PartitionSpec()), check_vma=False))


@pytest.fixture(params=['blocks', 'ragged', 'kernel'])
def form(request, monkeypatch):
    """On this CPU the blocks are chosen; the ragged form and the kernel, interpreted here, are those of TPUs."""
    if request.param == 'ragged':
        monkeypatch.setattr(jax.lax, 'platform_dependent', lambda *args, default, **forms: default(*args))
    return request.param


@pytest.mark.parametrize('sizes', [{'replica': 2, 'expert': 4}, {'expert': 2, 'tensor': 2, 'fsdp': 2}], ids=str)
def test_split_experts_are_the_loop_over_tokens_and_experts(form, sizes):
    x = np.random.default_rng(1).normal(size=(8, 3, 8)).astype(np.float32)
    run = on_mesh(make_mesh(sizes), Target('cpu', kernels=True) if form == 'kernel' else ANYWHERE)
    for name, preference in ROUTINGS.items():
        layer = layer_with(preference)
        found, load = run(layer, x)
        expected, chosen = oracle.moe(layer, x.reshape(-1, 8).astype(np.float64), MIXER)
        np.testing.assert_allclose(found.reshape(-1, 8), expected, atol=1e-5 * np.abs(expected).max(), err_msg=name)
        np.testing.assert_allclose(load, np.bincount(chosen.reshape(-1), minlength=8) / chosen.size, atol=1e-6, err_msg=name)
        if name != 'random':
            assert sorted(load) == pytest.approx([0] * 6 + [0.5] * 2)


@pytest.mark.parametrize(
    ('platform', 'kernels', 'called'),
    [
        ('cpu', False, None),
        ('tpu', False, 'ragged_dot'),
        ('tpu', True, 'tpu_custom_call'),
        ('cuda', False, None),
        ('rocm', False, 'ragged_dot'),
    ],
)
@pytest.mark.parametrize('known', [True, False], ids=['platform known', 'platform left to lowering'])
def test_only_where_it_is_a_grouped_matmul_the_ragged_one_is_called(known, platform, kernels, called):
    x, ids, w = jnp.ones((16, 8)), jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 2, 8, 8))
    network = lambda rows, matmuls, w: ((matmuls.into(rows, w['up'])[0],), w)
    target = Target(platform if known else '', kernels)
    run = lambda x, ids, w: grouped.apply_experts(x, ids, 4, grouped.Corner(2, 8, 8), network, {'up': Summed(w)}, target=target)
    text = jax.jit(run).trace(x, ids, w).lower(lowering_platforms=(platform,)).as_text()
    assert [name for name in ('ragged_dot', 'tpu_custom_call') if name in text] == ([called] if called else [])
