"""Generation with parameters split over a mesh: the same text, and rows and heads where the rules put them."""

import dataclasses

import jax
import pytest

from elastic_jax.infer.decoding import Decoding, requests_of
from elastic_jax.infer.generate import generate
from elastic_jax.infer.resident import Resident, weights_of
from elastic_jax.infer.sampling import Sampling
from elastic_jax.layout import Layout
from elastic_jax.nest.slice import slice_params
from elastic_jax.parallel.mesh import make_mesh
from elastic_jax.parallel.sharding import param_shardings
from tests.infer.tiny import LETTERS, Letters
from tests.tiny import HYBRID, numpy_params

LAYOUT = Layout(mlp=2, experts=2, kv_heads=2, shared_width=2)
ARCH = dataclasses.replace(HYBRID, vocab=24)
SMALL = ARCH.narrow(embed=16, mlp=16, experts=4, kv_heads=2, mamba_heads=4)
PARAMS = numpy_params(ARCH, LAYOUT)
PROMPTS = ['abcde', 'fghijklmnopqrstu']


@pytest.fixture(scope='module')
def resident():
    mesh = make_mesh({'fsdp': 2, 'tensor': 2}, jax.devices()[:4])
    params = jax.tree.map(jax.device_put, PARAMS, param_shardings(ARCH, LAYOUT, mesh))
    return Resident(params, ARCH, LAYOUT)


@pytest.mark.parametrize('arch', [ARCH, SMALL], ids=['full', 'small'])
def test_text_is_that_of_one_device(resident, arch):
    alone = weights_of(jax.tree.map(jax.numpy.asarray, slice_params(PARAMS, ARCH, arch, LAYOUT)), arch, LAYOUT)
    settings = [Sampling(), Sampling(1.0, top_k=9, repetition_penalty=1.2)]
    found, expected = (generate(w, LETTERS, PROMPTS, 24, settings, seeds=3) for w in (resident.weights(arch), alone))
    assert found == expected and max(len(done.tokens) for done in found) > 4


def test_rows_are_split_over_data_and_heads_over_tensor(resident):
    batch = Decoding(resident.weights(ARCH), requests_of([Sampling()] * 2, [0, 1]), 40, [5, 5])
    batch.feed([Letters().encode(prompt).tolist() for prompt in PROMPTS])
    whole_and_part = lambda leaf: (leaf.shape, leaf.sharding.shard_shape(leaf.shape))
    for leaf in batch.state.cache.blocks['layer_002']:
        (rows, heads, *rest), part = whole_and_part(leaf)
        assert part == (rows // 2, heads // 2, *rest)
    (rows, groups, *rest), part = whole_and_part(batch.state.cache.blocks['layer_000'].state_BxGxMxPxN)
    assert part == (rows // 2, groups // 2, *rest)
    assert whole_and_part(batch.state.logits_BxV)[1] == (1, 24)
