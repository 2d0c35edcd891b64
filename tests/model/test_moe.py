"""The mixture of experts against a loop over tokens and experts; all forms of grouped matmul; experts that are dropped."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_jax.arch import Arch, MoE
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model import grouped
from elastic_jax.model.context import Context
from elastic_jax.model.fetch import Summed, Way, fetch_summed
from elastic_jax.model.grouped_kernel import Corner
from elastic_jax.model.kernels import Target
from elastic_jax.model.moe import moe, route
from tests.model import oracle
from tests.tiny import numpy_params

CASES = {
    'nemotron': MoE(6, 5, 2, shared_width=8, scale=2.5),
    'qwen': MoE(6, 5, 3, activation='swiglu', scoring='softmax', correction_bias=False),
    'groups': MoE(12, 4, 3, groups=4, top_groups=2, shared_width=4, scale=1.5),
    'raw-weights': MoE(6, 4, 2, normalize=False, scoring='softmax', groups=2, top_groups=1, activation='swiglu', shared_width=6),
    'one-expert': MoE(1, 4, 1),
    'all-experts': MoE(4, 4, 4, normalize=False, correction_bias=False),
}
BLOCKED = Layout(experts=2, shared_width=2)


def layer_of(mixer, layout=FLAT, embed=8):
    return numpy_params(Arch.from_pattern('E', vocab=4, embed=embed, moe=mixer), layout)['layer_000']


@pytest.mark.parametrize(
    ('name', 'layout'), [*((name, FLAT) for name in CASES), ('nemotron', BLOCKED), ('raw-weights', BLOCKED)], ids=str
)
def test_moe_is_the_loop_over_tokens_and_experts(name, layout):
    mixer, layer = CASES[name], layer_of(CASES[name], layout)
    x = np.random.default_rng(1).normal(size=(2, 9, 8)).astype(np.float32)
    segments = np.asarray([[1] * 9, [1] * 4 + [2] * 3 + [0] * 2])
    run = jax.jit(lambda layer, x: moe(layer, x, mixer, Context(None, segments), None)[::2])
    found, aux = run(layer, x)
    expected, experts = oracle.moe(layer, x.reshape(-1, 8).astype(np.float64), mixer)
    np.testing.assert_allclose(found.reshape(-1, 8), expected, atol=1e-5 * np.abs(expected).max())
    real = experts[segments.reshape(-1) > 0]
    load = np.bincount(real.reshape(-1), minlength=mixer.experts) / real.size
    np.testing.assert_allclose(aux['expert_load'], load, atol=1e-6)


def test_balance_loss_is_one_when_balanced_and_more_when_not():
    mixer = MoE(4, 4, 1, scoring='softmax', correction_bias=False)
    layer, x = jax.tree.map(jnp.asarray, layer_of(mixer, embed=4)), np.eye(4, dtype=np.float32)[None]
    loss = jax.jit(
        lambda router: moe({**layer, 'router': router.reshape(4, 1, 4)}, x, mixer, Context(None), None).aux['balance_loss']
    )
    np.testing.assert_allclose(loss(5 * np.eye(4, dtype=np.float32)), 1.0, rtol=1e-5)
    crowded = loss(np.tile(np.asarray([5.0, 0, 0, 0], np.float32), (4, 1)))
    np.testing.assert_allclose(crowded, 4 * np.exp(5) / (np.exp(5) + 3), rtol=1e-5)


# Stored experts [G, E, F, D] = [2, 4, 6, 9], of which a budget uses the first three of each block, 5 wide and from 7 channels.
STORED, CORNER, EXPERTS = (2, 4, 6, 9), Corner(experts=3, width=5, embed=7), 6


def dense(x, ids, weights, stored, activation, corner=CORNER):
    """Every expert on every token, weighed: what grouped matmuls must give, differentiable, without any plan."""
    experts, width, embed = dataclasses.astuple(corner)
    w = {name: jnp.concatenate(list(w_GxExFxD[:, :experts, :width, :embed])) for name, w_GxExFxD in stored.items()}
    per_expert = jnp.einsum('nd,efd->enf', x, w['up'])
    gated = (
        jax.nn.silu(jnp.einsum('nd,efd->enf', x, w['gate'])) * per_expert
        if activation == 'swiglu'
        else jax.nn.relu(per_expert) ** 2
    )
    out_ExNxD = jnp.einsum('enf,efd->end', gated, w['down'])
    share_NxE = jnp.sum(jax.nn.one_hot(ids, 2 * experts) * weights[..., None], axis=1)
    return jnp.einsum('end,ne->nd', out_ExNxD, share_NxE)


# As a step on this machine has it, and with TPU's kernels interpreted.
TARGETS = {'here': Target('cpu'), 'kernels': Target('cpu', kernels=True)}


def network_of(activation, shares, rows, matmuls, w):
    hidden, up = matmuls.into(rows, w['up'])
    gated, gate = matmuls.into(rows, w['gate']) if activation == 'swiglu' else (None, w['gate'])
    hidden = jax.nn.relu(hidden) ** 2 if gated is None else jax.nn.silu(gated) * hidden
    out, down = matmuls.out_of((hidden * matmuls.of_pairs(shares.T)[:, None]).astype(rows.dtype), w['down'])
    return (out,), {'up': up, 'gate': gate, 'down': down}


def grouped_form(form, x, ids, weights, w, activation):
    ids, w, network = ids.T, {name: Summed(own) for name, own in w.items()}, functools.partial(network_of, activation, weights)
    own = lambda rows, matmuls: network(rows, matmuls, w)
    if form in TARGETS:
        (out,), _ = grouped.apply_experts(x, ids, EXPERTS, CORNER, network, w, target=TARGETS[form])
    elif form == 'triton':
        (out,), _ = grouped._run_by_triton(x, ids, EXPERTS, CORNER, own, grouped.Fill(), interpret=True)
    elif form == 'ragged':
        (out,), _ = grouped._run(x, ids, grouped.sorted_plan(ids, EXPERTS), CORNER, grouped._ragged_matmul, own, grouped.Fill())
    else:
        (out,), _ = grouped._run(
            x, ids, grouped.block_plan(ids, EXPERTS, block=4), CORNER, grouped._block_matmul, own, grouped.Fill()
        )
    return out


@functools.cache
def value_and_gradients(form, activation):
    run = dense if form == 'dense' else functools.partial(grouped_form, form)
    loss = lambda inputs, ids, weight: jnp.vdot(run(inputs[0], ids, *inputs[1:], activation), weight)
    return jax.jit(jax.value_and_grad(loss))


ROUTINGS = {
    'random': lambda rng: np.stack([rng.permutation(6)[:2] for _ in range(12)]),
    'all-to-one': lambda rng: np.tile([3, 5], (12, 1)),
    'most-idle': lambda rng: np.where(np.arange(12)[:, None] < 10, [0, 1], [5, 1]),
    'whole-blocks': lambda rng: np.stack([np.repeat([0, 2, 4], 4), np.repeat([1, 3, 5], 4)], axis=1),
    'one-token': lambda rng: np.asarray([[4, 0]]),
    'elsewhere': lambda rng: np.where(rng.uniform(size=(12, 2)) < 0.5, 6, rng.integers(0, 6, (12, 2))),
    'many-rows': lambda rng: rng.choice(7, (200, 2), p=[0.02, 0, 0.5, 0.2, 0.08, 0, 0.2]),
}


@pytest.mark.parametrize('routing', ROUTINGS)
@pytest.mark.parametrize(
    ('form', 'activation'),
    [
        ('blocks', 'swiglu'),
        ('ragged', 'swiglu'),
        ('here', 'relu2'),
        ('kernels', 'swiglu'),
        ('kernels', 'relu2'),
        ('triton', 'swiglu'),
    ],
    ids=str,
)
def test_grouped_matmuls_and_their_gradients_are_the_dense_ones(form, activation, routing):
    """Also with experts without rows, with pairs whose expert is on another device, and with less than is stored used."""
    rng = np.random.default_rng(2)
    ids = ROUTINGS[routing](rng)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    inputs = (draw(len(ids), 7), draw(*ids.shape), {name: draw(*STORED) for name in ('up', 'gate', 'down')})
    weight = draw(len(ids), 7)
    found = value_and_gradients(form, activation)(inputs, ids, weight)
    expected = value_and_gradients('dense', activation)(inputs, ids, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max())), found, expected)


@pytest.mark.parametrize('activation', ['swiglu', 'relu2'])
def test_one_sum_takes_the_gradients_of_all_users_of_the_experts(activation):
    """Two corners of which neither holds the other, one after the other, in float32 though the weights are in bfloat16: its
    gradient is that of the dense form, and nothing is left for the weights themselves."""
    rng = np.random.default_rng(8)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))
    stored = {name: draw(*STORED).astype(jnp.bfloat16).astype(jnp.float32) for name in ('up', 'gate', 'down')}
    corners = (Corner(experts=2, width=6, embed=9), Corner(experts=4, width=3, embed=8))
    users = []
    for corner in corners:
        ids = jnp.asarray(np.stack([rng.permutation(2 * corner.experts)[:2] for _ in range(20)]))
        users.append((corner, draw(20, corner.embed), ids, draw(20, 2), draw(20, corner.embed)))

    def by_kernels(stored, dtype):
        w, loss = {name: fetch_summed(own, Way(), dtype) for name, own in stored.items()}, 0.0
        for n, (corner, x, ids, weights, grad) in enumerate(users):
            own = {name: dataclasses.replace(own, last=n == len(users) - 1) for name, own in w.items()}
            network = functools.partial(network_of, activation, weights)
            experts = 2 * corner.experts
            (out,), w = grouped.apply_experts(x.astype(dtype), ids.T, experts, corner, network, own, target=TARGETS['kernels'])
            loss += jnp.vdot(out.astype(jnp.float32), grad)
        return loss

    def densely(stored):
        parts = [jnp.vdot(dense(x, ids, weights, stored, activation, corner), grad) for corner, x, ids, weights, grad in users]
        return sum(parts)

    expected = jax.grad(densely)(stored)
    found = jax.jit(jax.grad(functools.partial(by_kernels, dtype=jnp.float32)))(stored)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), found, expected)
    rounded = jax.jit(jax.grad(functools.partial(by_kernels, dtype=jnp.bfloat16)))(stored)
    for name in ('up', 'gate', 'down') if activation == 'swiglu' else ('up', 'down'):
        own = rounded[name]
        assert np.any(own != own.astype(jnp.bfloat16).astype(jnp.float32)), f'{name} was summed in bfloat16'
        np.testing.assert_allclose(own, expected[name], atol=3e-2 * np.abs(expected[name]).max())


in_turn_jit = jax.jit(grouped._run_in_turn, static_argnames=('experts', 'corner', 'network'))


@pytest.mark.parametrize('tokens', [1, 2, 30])
def test_where_nothing_is_trained_experts_run_in_turn(tokens):
    """Blocks of one, one and four rows; experts that are unused, and pairs (of id 6) whose expert is elsewhere."""
    rng = np.random.default_rng(tokens)
    up, down = rng.normal(size=(2, *STORED)).astype(np.float32)
    matrices, numbers = [Summed(jnp.asarray(w)) for w in (up, down)], rng.normal(size=(2, tokens)).astype(np.float32)

    def network(rows, matmuls):
        out = matmuls.out_of(matmuls.into(rows, matrices[0])[0], matrices[1])[0]
        return (out, out, rows, matmuls.of_pairs(numbers)), {}

    own = [np.concatenate(list(w[:, :3, :5, :7])) for w in (up, down)]
    for _ in range(5):
        x, ids = (
            rng.normal(size=(tokens, 7)).astype(np.float32),
            rng.integers(0, 7, (tokens, 2)) * rng.integers(0, 2, (tokens, 2)),
        )
        total, *of_pair = in_turn_jit(x, ids.T, EXPERTS, CORNER, network)
        out, rows, own_numbers = (jnp.swapaxes(u, 0, 1) for u in of_pair)
        present = (ids < 6)[..., None]
        hidden = np.einsum('nd,nkfd->nkf', x, own[0][np.minimum(ids, 5)])
        expected = np.where(present, np.einsum('nkf,nkfd->nkd', hidden, own[1][np.minimum(ids, 5)]), 0)
        np.testing.assert_allclose(out, expected, atol=5e-5)
        np.testing.assert_allclose(total, expected.sum(1), atol=1e-4)
        np.testing.assert_allclose(rows, np.where(present, x[:, None], 0), atol=1e-6)
        np.testing.assert_array_equal(own_numbers, np.where(ids < 6, numbers.T, 0))


plan_jit = jax.jit(grouped.block_plan, static_argnames=('experts', 'block'))


@pytest.mark.parametrize(('experts', 'top_k', 'tokens', 'block'), [(3, 1, 9, 3), (6, 2, 7, 2), (4, 2, 1, 4), (1, 1, 5, 1)])
@given(st.data())
def test_block_plans_give_every_pair_its_own_row_of_its_expert(experts, top_k, tokens, block, data):
    """Of any routing, also the worst: every expert one row more than whole blocks."""
    orders = st.permutations(range(experts))
    ids = np.asarray(data.draw(st.lists(orders, min_size=tokens, max_size=tokens)))[:, :top_k]
    check_block_plan(ids, experts, block)


def test_block_plans_have_room_for_the_worst_routing():
    check_block_plan(np.asarray([0, 1, 1, 1, 1, 2, 2, 2, 2])[:, None], 3, 3)


def check_block_plan(ids, experts, block):
    plan = jax.tree.map(np.asarray, plan_jit(ids, experts=experts, block=block))
    pairs, rows = ids.size, len(plan.pair_of_row)
    assert rows == len(plan.groups) * block == grouped.block_rows(pairs, experts, block)
    assert len(set(plan.row_of_pair.tolist())) == pairs
    assert plan.row_of_pair.max() < rows
    np.testing.assert_array_equal(plan.groups[plan.row_of_pair // block], ids.reshape(-1))
    np.testing.assert_array_equal(plan.pair_of_row[plan.row_of_pair], np.arange(pairs))
    assert (plan.pair_of_row == pairs).sum() == rows - pairs


route_jit = jax.jit(route, static_argnames='mixer')
ROUTERS = [
    MoE(8, 4, 2),
    MoE(8, 4, 2, scoring='softmax'),
    MoE(8, 4, 3, groups=2, top_groups=2),
    MoE(8, 4, 2, groups=2, top_groups=1, scoring='softmax'),
]


@settings(max_examples=60)
@given(st.sampled_from(ROUTERS), st.sampled_from([1.0, 30.0]), st.sampled_from([-100.0, -1.0, 0.0, 50.0]), st.data())
def test_a_dropped_expert_is_never_chosen(mixer, spread, offset, data):
    """Whatever the signs of scores and biases; the others are chosen and weighed as if it did not exist."""
    per_group = 8 // mixer.groups
    kept = data.draw(st.integers(2 if mixer.groups == 1 or mixer.top_groups > 1 else mixer.top_k, per_group))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x, router = rng.normal(size=(16, 5)).astype(np.float32), (spread * rng.normal(size=(5, 8))).astype(np.float32)
    bias = (offset + 3 * rng.normal(size=8)).astype(np.float32)
    alive = np.arange(8) % per_group < kept
    # The dropped ones would be everyone's choice.
    bias[~alive] += 200.0
    router[:, ~alive] *= 3.0
    ids, weights, _ = route_jit(x, router, bias, mixer, alive.astype(np.float32))
    assert alive[np.asarray(ids)].all()
    assert np.isfinite(weights).all()
    small = dataclasses.replace(mixer, experts=int(alive.sum()))
    small_ids, small_weights, _ = route_jit(x, router[:, alive], bias[alive], small)
    np.testing.assert_array_equal(ids, np.flatnonzero(alive)[np.asarray(small_ids)])
    np.testing.assert_allclose(weights, small_weights, rtol=1e-4, atol=1e-6)


def test_experts_are_chosen_by_score_and_bias_but_weighed_by_score():
    mixer = MoE(3, 4, 1, normalize=False)
    x, router = np.ones((1, 1), np.float32), np.asarray([[2.0, 1.0, 0.0]], np.float32)
    ids, weights, _ = route(x, router, np.asarray([0.0, 0.0, 1.0], np.float32), mixer)
    assert ids.tolist() == [[2]]
    np.testing.assert_allclose(weights, [[0.5]], rtol=1e-6)
    # No gradient flows through the choice, and none to the bias.
    by_bias = jax.grad(lambda bias: route(x, router, bias, mixer)[1].sum())(np.zeros(3, np.float32))
    np.testing.assert_array_equal(by_bias, np.zeros(3))
