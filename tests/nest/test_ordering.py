"""Invariant 2: ordering leaves the parent's function unchanged, and puts the important units first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.decoder import logits
from elastic_jax.nest import importance
from elastic_jax.nest.ordering import apply_ordering, make_ordering, ordering_hash
from tests.nest.test_masks import BLOCKED, noisy_params
from tests.tiny import GROUPED_MOE, HYBRID, LLAMA, QWEN_MOE


def calibration_batch(arch, seed=5):
    tokens = jax.random.randint(jax.random.key(seed), (2, 16), 0, arch.vocab)
    segments = jnp.asarray([[1] * 6 + [2] * 10, [1] * 13 + [0] * 3])
    positions = jnp.asarray([[*range(6), *range(10)], [*range(13), 0, 0, 0]])
    return {'tokens': tokens, 'segment_ids': segments, 'positions': positions}


@pytest.mark.parametrize('arch', [HYBRID, LLAMA, QWEN_MOE, GROUPED_MOE], ids=['hybrid', 'llama', 'qwen_moe', 'grouped_moe'])
def test_ordering_leaves_logits_unchanged(arch):
    batch = calibration_batch(arch)
    old = BLOCKED if arch is HYBRID else FLAT
    params = noisy_params(arch, old, 0)
    scores = importance.scores(importance.accumulate(params, [batch], arch), arch, old)
    ordering = make_ordering(scores, arch)
    assert any((np.diff(perm) < 0).any() for axes in ordering.values() for perm in axes.values())
    before = logits(params, batch['tokens'], arch, batch['segment_ids'])
    for new in (FLAT, old, Layout(mlp=4) if arch is HYBRID else FLAT):
        after = logits(apply_ordering(params, ordering, arch, old, new), batch['tokens'], arch, batch['segment_ids'])
        np.testing.assert_allclose(after, before, atol=2e-5 * float(jnp.abs(before).max()))


@pytest.mark.parametrize('layout', [FLAT, BLOCKED], ids=['flat', 'blocked'])
def test_ordered_scores_fall_along_every_axis(layout):
    """Scores measured again on the ordered parameters are sorted: the ordering put the right units first, in every layout."""
    batch = calibration_batch(HYBRID)
    params = noisy_params(HYBRID, layout, 1)
    measure = lambda p: importance.scores(importance.accumulate(p, [batch], HYBRID), HYBRID, layout)
    ordered = apply_ordering(params, make_ordering(measure(params), HYBRID), HYBRID, layout, layout)
    for group, axes in measure(ordered).items():
        for axis, score in axes.items():
            assert (np.diff(score, axis=-1) <= 1e-4 * np.abs(score).max()).all(), (group, axis)


def test_reap_worked_example():
    ids = np.asarray([[0, 1], [0, 2]])
    weights = np.asarray([[0.6, 0.4], [0.5, 0.5]], np.float32)
    norms = np.asarray([[3.0, 2.0], [1.0, 4.0]], np.float32)
    sums = importance.expert_sums(ids, weights * norms, np.ones(2, np.float32), 4)
    saliency = sums['saliency'] / np.maximum(sums['routed'], 1.0)
    np.testing.assert_allclose(saliency, [1.15, 0.8, 2.0, 0.0], rtol=1e-6)


def test_sums_of_a_stream_do_not_depend_on_its_batches_or_its_padding():
    params = noisy_params(HYBRID, FLAT, 2)
    batch = calibration_batch(HYBRID)
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]
    whole, split = (importance.accumulate(params, batches, HYBRID) for batches in ([batch], rows))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-3), whole, split)
    junk = {**batch, 'tokens': jnp.where(batch['segment_ids'] > 0, batch['tokens'], 7)}
    other = importance.accumulate(params, [junk], HYBRID)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), whole, other)


def test_layers_are_ranked_as_brute_force_removal_ranks_them():
    params = noisy_params(HYBRID, FLAT, 4)
    # One block is made nearly idle: it must go first.
    params['layer_002']['o'] = params['layer_002']['o'] * 1e-3
    batch = calibration_batch(HYBRID)
    ranking, errors = importance.rank_layers(params, [batch], HYBRID, min_units=HYBRID.units - 2)
    assert sorted(ranking) == list(range(HYBRID.units))
    assert ranking[-1] == 2
    real = (np.asarray(batch['segment_ids']) > 0)[..., None]
    full = np.asarray(logits(params, batch['tokens'], HYBRID, batch['segment_ids'])) * real

    def error_without(units):
        dropped = dataclasses.replace(HYBRID, mixers=tuple(None if i in units else m for i, m in enumerate(HYBRID.mixers)))
        out = np.asarray(logits(params, batch['tokens'], dropped, batch['segment_ids'])) * real
        return ((full - out) ** 2).sum() / (full**2).sum()

    first = min(range(HYBRID.units), key=lambda unit: error_without({unit}))
    second = min((u for u in range(HYBRID.units) if u != first), key=lambda unit: error_without({first, unit}))
    assert (ranking[-1], ranking[-2]) == (first, second)
    np.testing.assert_allclose(errors, [error_without({first}), error_without({first, second})], rtol=1e-3)
    assert HYBRID.narrow(layers=3).pattern.count('.') == 2


def test_ordering_hash_tells_orderings_apart():
    a = {'embedding': {'embed': np.arange(4, dtype=np.int32)}}
    b = {'embedding': {'embed': np.asarray([1, 0, 2, 3], np.int32)}}
    assert ordering_hash(a) == ordering_hash({'embedding': {'embed': np.arange(4, dtype=np.int64)}})
    assert ordering_hash(a) != ordering_hash(b)
