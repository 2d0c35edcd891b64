"""The router: soft masks, budgets, freezing to Archs, interpolation."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax import cost
from elastic_jax.errors import UserError
from elastic_jax.layout import Layout
from elastic_jax.nest.budgets import full_point, make_grid, metric, point_arch, resolve_targets, smallest_point
from elastic_jax.nest.freeze import freeze, freeze_between
from elastic_jax.nest.masks import hard_masks
from elastic_jax.nest.router import (
    Anneal,
    budget_loss,
    expected_cost,
    gumbel_softmax,
    init_router,
    interpolate,
    router_logits,
    soft_masks,
)
from tests.tiny import GROUPED_MOE, HYBRID

CHOICES = {
    'embed': (1.0, 0.75, 0.5),
    'mamba_heads': (8, 4),
    'query_heads': (2, 1),
    'mlp': (1.0, 2 / 3, 1 / 3),
    'experts': (8, 6, 4),
    'expert_width': (1.0, 0.5),
    'shared_width': (24, 8),
    'layers': (5, 4, 3),
}
PARENT = dataclasses.replace(HYBRID, ranking=(0, 3, 1, 2, 4))
BLOCKED = Layout(mlp=2, experts=2, kv_heads=2)
GRID = make_grid(PARENT, CHOICES, per_layer=('experts', 'expert_width'), layout=BLOCKED)
TARGETS = {'full': 1.0, 'mid': 0.7, 'small': 0.4}


def one_hot_probabilities(point):
    return {c.axis: jax.nn.one_hot(jnp.asarray(point[c.axis]), len(c.widths)) for c in GRID}


points = st.fixed_dictionaries({c.axis: st.tuples(*[st.integers(0, len(c.widths) - 1)] * c.rows) for c in GRID})


@given(points)
def test_certain_probabilities_give_the_masks_and_the_cost_of_the_slice(point):
    """Soft masks of a one-hot router are the hard masks, and expected widths cost what the frozen Arch costs."""
    child, probabilities = point_arch(PARENT, GRID, point), one_hot_probabilities(point)
    soft, hard = soft_masks(PARENT, GRID, probabilities, BLOCKED), hard_masks(PARENT, child, BLOCKED)
    np.testing.assert_allclose(soft.embed_D, hard.embed_D)
    for i, (name, own) in enumerate(hard.blocks.items()):
        assert float(soft.keep[name]) == hard.keep[name]
        if child.mixers[i] is not None:
            for axis, mask in own.items():
                np.testing.assert_allclose(soft.blocks[name].get(axis, np.ones_like(mask)), mask, err_msg=f'{name} {axis}')
    for name in ('parameters', 'active_parameters', 'memory'):
        measure = metric(name, 512)
        np.testing.assert_allclose(expected_cost(PARENT, GRID, probabilities, measure), measure(child, None), rtol=1e-5)


@pytest.mark.parametrize('ranking', [(), (4, 0, 2, 1, 3), (4, 2, 3, 1)], ids=str)  # rank_layers names only the units there are
def test_a_parent_with_dropped_blocks_is_searched_over_those_it_has(ranking):
    parent = dataclasses.replace(HYBRID, mixers=(None, *HYBRID.mixers[1:]), ranking=ranking)
    grid, measure = make_grid(parent, {'layers': (4, 3, 2)}), metric('parameters')
    for n in range(3):
        point = {'layers': (n,)}
        child, probabilities = point_arch(parent, grid, point), {'layers': jnp.eye(3)[n : n + 1]}
        soft, hard = soft_masks(parent, grid, probabilities).keep, hard_masks(parent, child).keep
        assert {name: float(soft[name]) for name in hard} == hard
        np.testing.assert_allclose(expected_cost(parent, grid, probabilities, measure), measure(child, None))


def test_gumbel_softmax_draws_the_choices_with_their_probabilities():
    """At a low temperature the largest entry is distributed as softmax(scale · logits)."""
    logits = {'mlp': jnp.tile(jnp.asarray([[0.5, 0.0, -0.3]]), (20000, 1))}
    drawn = gumbel_softmax(jax.random.key(0), logits, 0.01, 2.0)['mlp']
    np.testing.assert_allclose(drawn.sum(-1), 1.0, rtol=1e-5)
    frequency = np.bincount(np.argmax(drawn, -1), minlength=3) / 20000
    np.testing.assert_allclose(frequency, jax.nn.softmax(2.0 * logits['mlp'][0]), atol=0.015)


def test_schedules_go_from_start_to_end():
    temperature, scale = Anneal().at(0.0)
    assert (temperature, scale) == (1.0, 1.0)
    temperature, scale = Anneal().at(1.0)
    np.testing.assert_allclose([temperature, scale], [0.05, 10.0])


def train_router(measure, seed=0):
    """A router trained on its budget loss alone."""
    router = init_router(jax.random.key(seed), GRID, len(TARGETS))
    optimizer = optax.adam(1e-2)

    def loss_fn(router, key, progress):
        temperature, scale = Anneal().at(progress)
        total = 0.0
        for n, target in enumerate(TARGETS.values()):
            logits = router_logits(router, GRID, jax.nn.one_hot(n, len(TARGETS)))
            sampled = gumbel_softmax(jax.random.fold_in(key, n), logits, temperature, scale)
            total += budget_loss(PARENT, GRID, sampled, target, measure)[0]
        return total

    @jax.jit
    def step(router, state, key, progress):
        updates, state = optimizer.update(jax.grad(loss_fn)(router, key, progress), state)
        return optax.apply_updates(router, updates), state

    state = optimizer.init(router)
    for i in range(60):
        router, state = step(router, state, jax.random.key(i), i / 60)
    return router


@pytest.mark.parametrize('name', ['parameters', 'active_parameters', 'memory'])
def test_frozen_budgets_are_on_the_grid_nest_and_meet_their_targets_or_say_why(name):
    measure = metric(name, 512)
    frozen = freeze(train_router(measure), GRID, PARENT, TARGETS, measure)
    assert frozen['full'].arch == PARENT
    for larger, smaller in itertools.pairwise(frozen.values()):
        assert smaller.arch.nests_in(larger.arch)
    for result in frozen.values():
        BLOCKED.check(result.arch)
        assert result.share == pytest.approx(measure(result.arch, None) / measure(PARENT, None))
        assert abs(result.miss) <= 0.05 or result.note, result


def test_a_router_in_favour_of_everything_small_or_large_is_brought_to_its_budget():
    """Freezing mends what argmax misses, and says what argmax alone would have cost."""
    measure = metric('parameters')
    for favoured in (0, -1):
        router = init_router(jax.random.key(0), GRID, 3)
        for choices in GRID:
            out = jnp.zeros((choices.rows, len(choices.widths))).at[:, favoured].set(1.0).reshape(-1)
            router[choices.axis] = {'hidden': jnp.ones((3, 256)), 'out': jnp.tile(out, (256, 1))}
        frozen = freeze(router, GRID, PARENT, TARGETS, measure)
        assert abs(frozen['mid'].argmax_share / 0.7 - 1) > 0.25
        assert abs(frozen['mid'].miss) <= 0.05


def test_a_grid_too_coarse_for_a_budget_is_said():
    grid = make_grid(PARENT, {'embed': (1.0, 0.25)})
    measure = metric('parameters')
    frozen = freeze(init_router(jax.random.key(0), grid, 2), grid, PARENT, {'full': 1.0, 'mid': 0.6}, measure)
    assert abs(frozen['mid'].miss) > 0.05 and 'add choices' in frozen['mid'].note


@pytest.mark.parametrize('target', [0.85, 0.6, 0.5])
def test_a_budget_between_the_trained_ones_is_interpolated(target):
    measure = metric('parameters')
    result = freeze_between(train_router(measure), GRID, PARENT, TARGETS, target, measure, tolerance=0.05)
    assert abs(result.share / target - 1) <= 0.05
    assert result.arch.nests_in(PARENT)


def test_interpolation_weights_stand_for_the_target():
    shares = list(TARGETS.values())
    for target in (1.0, 0.9, 0.7, 0.55, 0.4):
        weights = interpolate(TARGETS, target)
        assert sum(weights) == pytest.approx(1.0) and sum(w > 0 for w in weights) <= 2
        assert np.dot(weights, shares) == pytest.approx(target)


def test_the_full_budget_is_anchored_and_the_dead_zone_is_free():
    measure = metric('parameters')
    full = one_hot_probabilities(full_point(GRID))
    assert float(budget_loss(PARENT, GRID, full, 1.0, measure)[0]) == 0.0
    small = one_hot_probabilities(smallest_point(GRID))
    anchored, share = budget_loss(PARENT, GRID, small, 1.0, measure)
    assert float(anchored) > 1.0
    assert float(budget_loss(PARENT, GRID, small, float(share) * 1.04, measure)[0]) == 0.0
    np.testing.assert_allclose(budget_loss(PARENT, GRID, small, float(share) / 1.25, measure)[0], 0.2, atol=1e-4)


def test_shares_are_rounded_to_the_layout_and_the_tile():
    shares = {'mlp': (0.7,), 'embed': (0.6,)}
    widths = lambda tile: {choices.axis: choices.widths for choices in make_grid(PARENT, shares, layout=BLOCKED, multiple=tile)}
    assert widths(4) == {'mlp': (48, 32), 'embed': (32, 20)}  # 33.6 to a multiple of 8, 19.2 to one of 4
    assert widths(8) == {'mlp': (48, 34), 'embed': (32, 16)}  # 48 is only three times 16
    assert widths(128) == widths(1) == {'mlp': (48, 34), 'embed': (32, 19)}
    assert make_grid(GROUPED_MOE, {'experts': (0.5,)})[0].widths == (16, 8)


@pytest.mark.parametrize(
    ('choices', 'per_layer', 'message'),
    [
        ({'mpl': (1.0,)}, (), "unknown axis in choices 'mpl'; did you mean 'mlp'"),
        ({'embed': (1.0,)}, ('mlp',), "'mlp' is to be chosen per layer, but has no choices"),
        ({'embed': (1.0,)}, ('embed',), "'embed' is one for all blocks and cannot be chosen per layer"),
        ({'embed': (1.5,)}, (), 'a share is at most 1.0'),
        ({'embed': (64,)}, (), 'embed=64 does not nest: the parent has 32'),
        ({'mlp': (47,)}, (), 'mlp@3=47 is not a multiple'),
        ({'embed': (True,)}, (), 'choice True of axis embed'),
    ],
    ids=str,
)
def test_choices_that_cannot_be_are_named(choices, per_layer, message):
    with pytest.raises(UserError, match=message):
        make_grid(PARENT, choices, per_layer, BLOCKED)


def test_budgets_are_shares_or_absolute_costs():
    measure = metric('parameters')
    half = int(cost.parameters(PARENT)) // 2
    targets = resolve_targets({'half': half, 'full': 1.0}, PARENT, GRID, measure, 0.05)
    assert list(targets) == ['full', 'half'] and targets['half'] == pytest.approx(0.5, abs=1e-4)
    for budgets, message in (({'a': 0.01}, 'smallest choices reach'), ({'a': 10**12}, 'not between 0 and')):
        with pytest.raises(UserError, match=message):
            resolve_targets(budgets, PARENT, GRID, measure, 0.05)
