"""Fetching parameters from their parts, and reducing their gradients to them, against the whole array and its sums in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from elastic_jax.model.fetch import Way, fetch
from elastic_jax.model.params import Param, param_table
from elastic_jax.parallel.mesh import make_mesh
from elastic_jax.parallel.sharding import fetch_ways, param_spec
from tests.tiny import HYBRID

MESHES = {'one axis': {'fsdp': 8}, 'two axes': {'fsdp': 4, 'expert': 2}}


@pytest.mark.parametrize('sizes', MESHES.values(), ids=MESHES)
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 10), last=st.booleans(), matrix=st.booleans(), others=st.sampled_from([(6,), (3, 4), (2, 3, 2)]))
def test_a_parameter_arrives_whole_and_its_gradients_are_added_up(sizes, rows, last, matrix, others):
    mesh, total = make_mesh(sizes), rows * 8
    shape, dim = ((*others, total), len(others)) if last else ((total, *others), 0)
    axes = tuple(sizes)
    spec = PartitionSpec(*[axes if i == dim else None for i in range(len(shape))])
    rng = np.random.default_rng(rows)
    w = rng.normal(size=shape).astype(np.float32)
    grads = rng.normal(size=(8, *shape)).astype(np.float32)  # every device's own

    def run(part, grad):
        whole, back = jax.vjp(lambda part: fetch(part, Way(axes, dim, matrix), jnp.float32), part)
        return whole[None], back(grad[0])[0]

    each = PartitionSpec(axes)
    on_mesh = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec, each), out_specs=(each, spec), check_vma=False))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    wholes, reduced = on_mesh(put(w, spec), put(grads, each))
    for whole in np.asarray(wholes):
        np.testing.assert_array_equal(whole, w)
    np.testing.assert_allclose(reduced, grads.astype(np.float64).sum(0), rtol=1e-5, atol=1e-5)


def test_words_are_stored_as_whole_rows_where_their_number_divides():
    mesh = make_mesh({'fsdp': 8})
    table = param_table(HYBRID)
    embedding, unembedding = table['embedding']['table'], table['unembed']['kernel']
    assert HYBRID.vocab % 8 == 0
    assert param_spec(embedding, mesh) == PartitionSpec('fsdp', None)
    assert param_spec(unembedding, mesh) == PartitionSpec('fsdp', None)  # [embed, vocab]: of embed
    odd = Param((HYBRID.vocab + 1, HYBRID.embed), embedding.axes, embedding.init)
    assert param_spec(odd, mesh) == PartitionSpec(None, 'fsdp')
    assert fetch_ways(odd, param_spec(odd, mesh)) == (Way(('fsdp',), 1, matrix=True),)
