"""Grouped-query attention with every option against loops in float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.arch import Arch, Attention, Rope
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.attention import _attend_filled, attend_causally, attention
from elastic_jax.model.context import Context
from tests.model import oracle
from tests.tiny import numpy_params

ROPES = {'no-rope': None, 'rope': Rope(100.0), 'scaled-rope': Rope(1e4, (8.0, 1.0, 4.0, 16.0))}
CASES = [
    Attention(2, 3, 6, rope=rope, qk_norm=qk_norm, bias=bias, output_bias=bias)
    for rope, (qk_norm, bias) in itertools.product(ROPES.values(), [(False, False), (True, True)])
]


@pytest.mark.parametrize('layout', [FLAT, Layout(kv_heads=2)], ids=['flat', 'blocked'])
@pytest.mark.parametrize('mixer', CASES, ids=str)
def test_attention_is_the_loop_over_heads_and_tokens(mixer, layout):
    arch = Arch.from_pattern('*', vocab=4, embed=10, attention=mixer)
    layer = numpy_params(arch, layout)['layer_000']
    x = np.random.default_rng(1).normal(size=(2, 9, 10)).astype(np.float32)
    segments = np.asarray([[1] * 9, [1, 2, 2, 2, 2, 3, 3, 3, 3]])
    positions = np.asarray([range(9), [0, *range(4), *range(4)]])
    run = jax.jit(lambda layer, x: attention(layer, x, mixer, Context(positions, segments, norm_eps=1e-3), None).y_BxTxD)
    found = run(layer, x)
    layer64 = {name: leaf.astype(np.float64) for name, leaf in layer.items()}
    for row, spans in enumerate([[(0, 9)], [(0, 1), (1, 5), (5, 9)]]):
        for start, end in spans:
            expected = oracle.attention(layer64, x[row, start:end].astype(np.float64), mixer, 1e-3)
            np.testing.assert_allclose(found[row, start:end], expected, atol=1e-5 * np.abs(expected).max())


def test_scaled_rotary_has_all_three_bands():
    """The case above is a test of Llama's rule only if it slows some frequencies, blends some and keeps some."""
    _, low, high, original = ROPES['scaled-rope'].scaling
    wavelengths = 2 * np.pi * 1e4 ** (np.arange(0, 6, 2) / 6)
    assert [w > original / low for w in wavelengths] == [False, True, True]
    assert wavelengths[0] > original / high


@pytest.mark.parametrize('segmented', [False, True])
def test_long_sequences_in_pieces_are_the_whole(segmented):
    """Outputs and all gradients, with a last piece that is padded and a document that crosses pieces."""
    rng, length = np.random.default_rng(2), 11
    q, k, v, weight = (
        jnp.asarray(rng.normal(size=(2, length, *shape)), jnp.float32) for shape in ((2, 3, 4), (2, 4), (2, 4), (2, 3, 4))
    )
    segments = jnp.asarray([[1] * 11, [1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3]]) if segmented else None

    def run(longest):
        loss = lambda q, k, v: jnp.sum(weight * attend_causally(q, k, v, segments, longest, rows=4))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for whole, pieces in zip(jax.tree.leaves(run(length)), jax.tree.leaves(run(8)), strict=True):
        np.testing.assert_allclose(pieces, whole, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize('rows, narrowest', [(64, 64), (256, 128)])
@pytest.mark.parametrize('length', [1, 40, 128])
@pytest.mark.parametrize('slots', [64, 96, 384])
def test_a_cache_is_read_as_far_as_its_rows_are_filled(slots, length, rows, narrowest):
    """Against a float64 softmax over each query's own slots; slots past the next compiled width are poisoned with NaN."""
    rng, (batch, heads, group, dim) = np.random.default_rng(slots + length), (3, 2, 2, 8)
    for start_B in (np.asarray([0, 5, 17]), rng.integers(0, slots, batch)):
        start_B = np.minimum(start_B, max(0, slots - length))
        last_BxT = np.minimum(start_B[:, None] + np.arange(length), slots - 1)
        q = rng.standard_normal((batch, length, heads, group, dim)).astype(np.float32)
        k = rng.standard_normal((batch, heads, dim, slots)).astype(np.float32)
        v = rng.standard_normal((batch, heads, slots, dim)).astype(np.float32)
        expected = np.zeros(q.shape)
        for b, t in itertools.product(range(batch), range(length)):
            seen = slice(last_BxT[b, t] + 1)
            scores = np.einsum('kqh,khs->kqs', q[b, t].astype(np.float64), k[b, ..., seen]) / np.sqrt(dim)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            expected[b, t] = np.einsum('kqs,ksh->kqh', weights / weights.sum(-1, keepdims=True), v[b, :, seen])
        width = next((width for width in (64, 128, 256) if max(narrowest, last_BxT.max() + 1) <= width), slots)
        k[..., width:], v[:, :, width:] = np.nan, np.nan
        found = jax.jit(partial(_attend_filled, rows=rows, narrowest=narrowest))(q, k, v, last_BxT)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
