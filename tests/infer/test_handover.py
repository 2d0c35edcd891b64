"""Handing over a cache: what both sizes have is what the taker would have computed, the rest follows the stated rule."""

import jax
import numpy as np
import pytest

from elastic_jax.errors import UserError
from elastic_jax.infer.decoding import Decoding, requests_of
from elastic_jax.infer.handover import hand_over
from elastic_jax.infer.resident import weights_of
from elastic_jax.infer.sampling import Sampling
from elastic_jax.layout import Layout
from elastic_jax.model.attention import KVCache
from elastic_jax.nest.slice import slice_params
from tests.tiny import HYBRID, LLAMA, numpy_params

SLOTS = 96
LAYOUT = Layout(kv_heads=2, mlp=2)
# A first block's cache depends on the embedding alone, so at full embedding width sizes agree on the heads that they share.
FIRST = {
    'mamba': (HYBRID.__class__(64, 32, (HYBRID.mixers[0],)), {'mamba_heads': 4, 'mamba_head_dim': 3}),
    'attention': (HYBRID.__class__(64, 32, (HYBRID.mixers[2],)), {'kv_heads': 2}),
}


def filled(arch, parent, layout=LAYOUT, rows=2):
    """(weights, the cache after some tokens) of a size of `parent`."""
    params = slice_params(numpy_params(parent, layout), parent, arch, layout)
    weights = weights_of(jax.tree.map(jax.numpy.asarray, params), arch, layout)
    decoding = Decoding(weights, requests_of([Sampling()] * rows, [0] * rows), 30, [1] * rows)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 20))
    decoding.feed([tokens[0, :11].tolist(), tokens[1, :20].tolist()])
    return weights, decoding.state.cache


@pytest.mark.parametrize('first', FIRST)
def test_a_wider_sizes_cache_is_cut_to_what_the_narrower_would_have(first):
    parent, widths = FIRST[first]
    child = parent.narrow(widths)
    _, given = filled(parent, parent)
    taker, own = filled(child, parent)
    assert_close(hand_over(given, parent, taker, SLOTS), own)


@pytest.mark.parametrize('fill', ['zero', 'mean'])
@pytest.mark.parametrize('first', FIRST)
def test_a_narrower_sizes_cache_keeps_its_heads_and_the_missing_ones_follow_the_rule(first, fill):
    parent, widths = FIRST[first]
    child = parent.narrow(widths)
    _, given = filled(child, parent)
    taker, own = filled(parent, parent)
    handed = hand_over(given, child, taker, SLOTS, fill)
    assert jax.tree.map(np.shape, handed) == jax.tree.map(np.shape, own)
    # Cut again, nothing of what was given is lost or displaced.
    assert_close(hand_over(handed, parent, weights_of({}, child, LAYOUT), SLOTS), given)
    blocks, kept = handed.blocks['layer_000'], own.blocks['layer_000']
    if first == 'mamba':
        groups, per_group, channels = 2, 2, 3
        state = np.asarray(blocks.state_BxGxMxPxN)
        np.testing.assert_allclose(
            state[:, :, :per_group, :channels], kept.state_BxGxMxPxN[:, :, :per_group, :channels], atol=1e-5
        )
        mean = state[:, :, :per_group].mean(2, keepdims=True)
        expected = np.broadcast_to(mean if fill == 'mean' else 0, state[:, :, per_group:].shape)
        np.testing.assert_allclose(state[:, :, per_group:], expected, atol=1e-6)
        assert state.shape[1] == groups
    else:
        # Four heads in two blocks: ranks 0 and 2 in the first, 1 and 3 in the second; the child has ranks 0 and 1.
        keys = np.asarray(blocks.k_BxKxHxS)
        np.testing.assert_allclose(keys[1, [0, 2], :, :20], np.asarray(kept.k_BxKxHxS)[1, [0, 2], :, :20], atol=1e-5)
        expected = keys[:, [0, 2]] if fill == 'mean' else np.zeros_like(keys[:, [1, 3]])
        np.testing.assert_allclose(keys[:, [1, 3]], expected)


@pytest.mark.parametrize('parent', [HYBRID, LLAMA], ids=['hybrid', 'llama'])
def test_any_pair_of_sizes_has_the_takers_shapes(parent):
    """Also of dropped layers, and of sizes of which neither nests in the other."""
    layout = Layout()
    sizes = [
        parent,
        parent.narrow(layers=1, kv_heads=1),
        parent.narrow({'mamba_heads': 4} if parent is HYBRID else {'embed': 16}),
    ]
    caches = [filled(size, parent, layout) for size in sizes]
    for giver, (_, given) in zip(sizes, caches, strict=True):
        for taker, own in caches:
            handed = hand_over(given, giver, taker, SLOTS, 'mean' if taker.arch == parent else 'zero')
            assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), handed) == jax.tree.map(
                lambda leaf: (leaf.shape, leaf.dtype), own
            )
            np.testing.assert_array_equal(handed.length_B, given.length_B)
            if giver == taker.arch:
                assert_close(handed, given)


def test_an_unknown_rule_is_one_sentence():
    parent, _ = FIRST['mamba']
    weights, cache = filled(parent, parent)
    with pytest.raises(UserError, match="fill='ones' is not a rule"):
        hand_over(cache, parent, weights, SLOTS, 'ones')


def assert_close(found, expected):
    """Real tokens only: what stands past a row's end is never looked at."""
    assert found.blocks.keys() == expected.blocks.keys()
    for name, block in expected.blocks.items():
        for ours, theirs in zip(found.blocks[name], block, strict=True):
            assert ours.shape == theirs.shape
            if isinstance(block, KVCache):
                slots = -1 if theirs is block.k_BxKxHxS else -2
                for row, length in enumerate(np.asarray(expected.length_B)):
                    real = lambda leaf, row=row, length=length, slots=slots: np.moveaxis(leaf[row], slots, 0)[:length]
                    np.testing.assert_allclose(real(ours), real(theirs), atol=1e-5)
            else:
                np.testing.assert_allclose(ours, theirs, atol=1e-5)
