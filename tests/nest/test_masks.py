"""Invariant 1: the masked parent computes what the sliced submodel computes, for every axis."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.decoder import Decoder, logits
from elastic_jax.model.params import init_params
from elastic_jax.nest.masks import hard_masks, mask_params, softs
from elastic_jax.nest.slice import slice_params
from tests.tiny import GROUPED_MOE, HYBRID, LLAMA, QWEN_MOE

BLOCKED = Layout(mlp=2, shared_width=4, experts=2, kv_heads=2)
HYBRID_CASES = [
    {'embed': 24},
    {'query_heads': 1},
    {'kv_heads': 2},
    {'mamba_heads': 4},
    {'mamba_head_dim': 2},
    {'mlp': 32},
    {'experts': 4},
    {'expert_width': 8},
    {'shared_width': 16},
    {'layers': 3},
    {'embed': 16, 'mamba_heads': 4, 'mlp': 16, 'mlp@3': 32, 'experts@1': 6, 'expert_width@4': 4, 'layers': 4},
    {'embed': 24, 'query_heads': 1, 'kv_heads': 2, 'mamba_heads': 4, 'mamba_head_dim': 2, 'mlp': 32, 'experts': 4,
     'expert_width': 8, 'shared_width': 16, 'layers': 4},
]  # fmt: skip


def check_masked_equals_sliced(arch, widths, layout, seed=0):
    params = noisy_params(arch, layout, seed)
    tokens = jax.random.randint(jax.random.key(seed + 1), (2, 19), 0, arch.vocab)
    segments = jnp.asarray([[1] * 7 + [2] * 12, [1] * 15 + [0] * 4])
    child = arch.narrow(widths)
    masks = hard_masks(arch, child, layout)
    masked = logits(mask_params(params, arch, masks, layout), tokens, arch, segments, soft=softs(arch, masks, layout))
    sliced = Decoder(child, layout).apply({'params': slice_params(params, arch, child, layout)}, tokens, segments)
    assert jnp.max(jnp.abs(sliced)) > 0.1
    np.testing.assert_allclose(masked, sliced, atol=2e-5 * float(jnp.abs(sliced).max()))
    full = logits(params, tokens, arch, segments)
    assert jnp.max(jnp.abs(full - sliced)) > 1e-3, 'the slice changed nothing: the case shows nothing'


def noisy_params(arch, layout, seed):
    """Random parameters in which no norm scale is one and no bias zero, so that a forgotten mask shows."""
    params = init_params(jax.random.key(seed), arch, layout)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 7), len(leaves))
    return jax.tree.unflatten(tree, [leaf + 0.2 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)])


@pytest.mark.parametrize('layout', [FLAT, BLOCKED], ids=['flat', 'blocked'])
@pytest.mark.parametrize('widths', HYBRID_CASES, ids=str)
def test_masked_is_sliced_on_every_axis(widths, layout):
    check_masked_equals_sliced(HYBRID, widths, layout)


@pytest.mark.parametrize(
    ('arch', 'widths'),
    [
        (LLAMA, {'embed': 16, 'query_heads': 1, 'mlp': 24, 'layers': 1}),
        (QWEN_MOE, {'embed': 16, 'kv_heads': 1, 'experts': 4, 'expert_width': 8}),
        (GROUPED_MOE, {'experts': 8, 'embed': 16, 'expert_width': 4}),
    ],
    ids=['llama', 'qwen_moe', 'grouped_moe'],
)
def test_masked_is_sliced_in_every_family(arch, widths):
    check_masked_equals_sliced(arch, widths, FLAT)


def test_hard_masks_of_the_parent_itself_change_nothing():
    params = noisy_params(HYBRID, FLAT, 3)
    masks = hard_masks(HYBRID, HYBRID)
    chex.assert_trees_all_equal(mask_params(params, HYBRID, masks), params)
