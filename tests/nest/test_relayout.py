"""Changing the layout moves units and changes no function."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.decoder import logits
from elastic_jax.model.params import leaves, map_table, param_table
from elastic_jax.nest.relayout import relayout
from elastic_jax.nest.slice import slice_params
from tests.tiny import GROUPED_MOE, HYBRID, LLAMA

CASES = {
    'hybrid': (HYBRID, Layout(mlp=4, shared_width=2, experts=2, kv_heads=2), {'mlp': 24, 'experts': 4, 'shared_width': 12}),
    'routing groups': (GROUPED_MOE, Layout(shared_width=4, kv_heads=2, experts=4), {'experts': 8}),
    'llama': (LLAMA, Layout(mlp=2), {'mlp': 20}),
}


@pytest.mark.parametrize('name', CASES)
def test_a_slice_is_the_same_model_in_every_layout_and_the_way_back_is_exact(name):
    arch, layout, widths = CASES[name]
    noise = np.random.default_rng(0)
    flat = map_table(lambda param: 0.2 * noise.standard_normal(param.shape, np.float32), param_table(arch))
    blocked = relayout(flat, arch, FLAT, layout)
    again = relayout(blocked, arch, layout, FLAT)
    for group, leaf, param in leaves(param_table(arch, layout)):
        assert blocked[group][leaf].shape == param.shape
        assert np.array_equal(again[group][leaf], flat[group][leaf])
    child = arch.narrow(widths)
    run = jax.jit(lambda params, tokens: logits(params, tokens, child))
    tokens = noise.integers(0, arch.vocab, (2, 12))
    by_layout = [run(slice_params(params, arch, child, own), tokens) for params, own in ((flat, FLAT), (blocked, layout))]
    np.testing.assert_allclose(*by_layout, rtol=1e-4, atol=1e-4)
