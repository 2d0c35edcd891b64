"""Invariant 4: a lockstep step's loss and gradients are the sum of the independent submodels'."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elastic_jax.arch import Arch
from elastic_jax.layout import FLAT
from elastic_jax.model.decoder import logits
from elastic_jax.model.losses import Students, kl_losses
from elastic_jax.nest.slice import slice_params
from elastic_jax.train.gradients import accumulated
from elastic_jax.train.state import guarded_update, new_state
from elastic_jax.train.step import StepConfig, balance_experts, elastic_loss, make_elastic_step, make_pretrain_step
from tests.nest.test_masks import BLOCKED, noisy_params
from tests.tiny import HYBRID, LLAMA

HYBRID_BUDGETS = (
    ('full', HYBRID),
    ('mid', HYBRID.narrow(embed=24, mlp=32, experts=6, query_heads=1)),
    ('small', HYBRID.narrow(embed=16, mlp=16, mamba_heads=4, mamba_head_dim=2, expert_width=8, shared_width=16, layers=4)),
)
LLAMA_BUDGETS = (('full', LLAMA), ('small', LLAMA.narrow(embed=16, mlp=24, kv_heads=1, layers=1)))


def make_batch(arch: Arch, seed: int = 0, rows: int = 2, length: int = 12) -> dict[str, jax.Array]:
    tokens, targets = jax.random.randint(jax.random.key(seed), (2, rows, length), 0, arch.vocab)
    segments = jnp.tile(jnp.asarray([[1] * 5 + [2] * (length - 7) + [0] * 2]), (rows, 1))
    positions = jnp.tile(jnp.asarray([[*range(5), *range(length - 7), 0, 0]]), (rows, 1))
    mask = (segments > 0).astype(jnp.float32)
    return {'tokens': tokens, 'targets': targets, 'segment_ids': segments, 'positions': positions, 'loss_mask': mask}


def plain_loss(params, teacher_params, parent, arch, layout, batch, kind):
    """One independent submodel's loss, written without anything of the step: full logits, plain KL or cross-entropy."""
    student = logits(slice_params(params, parent, arch, layout), batch['tokens'], arch, batch['segment_ids'])
    log_q = jax.nn.log_softmax(student)
    if kind == 'kl':
        log_p = jax.nn.log_softmax(logits(teacher_params, batch['tokens'], parent, batch['segment_ids']))
        per_token = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    else:
        per_token = -jnp.take_along_axis(log_q, batch['targets'][..., None], axis=-1)[..., 0]
    return jnp.sum(per_token * batch['loss_mask']) / jnp.sum(batch['loss_mask'])


@pytest.mark.parametrize(
    ('budgets', 'layout', 'teacher', 'remat'),
    [
        (HYBRID_BUDGETS, FLAT, 'frozen', False),
        (HYBRID_BUDGETS, BLOCKED, 'frozen', True),
        (HYBRID_BUDGETS, FLAT, 'none', False),
        (LLAMA_BUDGETS, FLAT, 'frozen', False),
    ],
    ids=['hybrid', 'blocked-remat', 'cross-entropy', 'llama'],
)
def test_lockstep_is_the_sum_of_independents(budgets, layout, teacher, remat):
    parent, weights = budgets[0][1], (0.5, 0.3, 0.2)[: len(budgets)]
    params, teacher_params = noisy_params(parent, layout, 0), noisy_params(parent, layout, 1)
    batch = make_batch(parent)
    loss_fn = elastic_loss(parent, budgets, weights, StepConfig(layout, remat=remat, chunk=5), teacher)
    count = batch['loss_mask'].sum()
    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, teacher_params, batch, count)
    kind = 'kl' if teacher == 'frozen' else 'cross_entropy'
    expected, expected_grads = 0.0, jax.tree.map(jnp.zeros_like, params)
    for (name, arch), weight in zip(budgets, weights, strict=True):
        own = jax.jit(jax.value_and_grad(lambda p, arch=arch: plain_loss(p, teacher_params, parent, arch, layout, batch, kind)))
        value, own_grads = own(params)
        np.testing.assert_allclose(metrics[f'loss/{name}'], value, rtol=2e-5)
        expected += weight * value
        expected_grads = jax.tree.map(lambda total, g, weight=weight: total + weight * g, expected_grads, own_grads)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    largest = optax.tree.norm(expected_grads)
    chex.assert_trees_all_close(grads, expected_grads, atol=float(2e-5 * largest))
    assert float(largest) > 1e-3


def test_self_distillation_teaches_the_small_from_the_full_and_the_full_from_text():
    params, batch = noisy_params(HYBRID, FLAT, 0), make_batch(HYBRID)
    budgets = HYBRID_BUDGETS[::2]
    loss_fn = elastic_loss(HYBRID, budgets, (0.5, 0.5), StepConfig(), 'self')
    (_, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, {}, batch, batch['loss_mask'].sum())
    full = lambda p: plain_loss(p, None, HYBRID, HYBRID, FLAT, batch, 'cross_entropy')
    small = lambda p: plain_loss(p, params, HYBRID, budgets[1][1], FLAT, batch, 'kl')
    expected = jax.jit(jax.grad(lambda p: 0.5 * full(p) + 0.5 * small(p)))(params)
    chex.assert_trees_all_close(grads, expected, atol=float(2e-5 * optax.tree.norm(expected)))
    np.testing.assert_allclose(metrics['loss/full'], full(params), rtol=1e-5)


def test_no_array_of_all_tokens_by_vocabulary_exists_in_the_compiled_head():
    hidden, kernel = jnp.ones((2, 64, 8)), jnp.ones((8, 251))
    mask = jnp.ones((2, 64))
    head = lambda h, w: kl_losses([Students((h,), w)], [1.0], (hidden, kernel), mask, 128.0, chunk=16)[0]
    text = jax.jit(jax.grad(head, argnums=(0, 1))).lower(hidden, kernel).compile().as_text()
    assert '251' in text
    assert '2,64,251' not in text and '128,251' not in text


def test_micro_batches_add_up_to_the_whole_batch():
    params, teacher_params = noisy_params(HYBRID, FLAT, 0), noisy_params(HYBRID, FLAT, 1)
    batch = make_batch(HYBRID, rows=4)
    batch['loss_mask'] = batch['loss_mask'].at[0].set(0.0)  # uneven: means of micro-batches would differ
    loss_fn = elastic_loss(HYBRID, HYBRID_BUDGETS, (0.5, 0.3, 0.2), StepConfig())
    count = batch['loss_mask'].sum()
    whole, split = (jax.jit(lambda p, n=n: accumulated(loss_fn, p, teacher_params, batch, count, n))(params) for n in (1, 2))
    np.testing.assert_allclose(whole[0], split[0], rtol=1e-5)
    chex.assert_trees_all_close(whole[2], split[2], atol=float(1e-5 * optax.tree.norm(whole[2])))
    chex.assert_trees_all_close(whole[1]['loss/small'], split[1]['loss/small'], rtol=1e-5)


def test_a_non_finite_gradient_changes_nothing_but_the_counters():
    optimizer = optax.adam(0.1)
    state = new_state({'w': jnp.ones(3)}, optimizer)
    good, _ = guarded_update(state, ({'w': jnp.ones(3)}, {}), jnp.ones(()), optimizer)
    for grads, loss in (({'w': jnp.asarray([1.0, jnp.nan, 1.0])}, 1.0), ({'w': jnp.ones(3)}, jnp.inf)):
        bad, metrics = guarded_update(good, (grads, {}), jnp.asarray(loss), optimizer)
        chex.assert_trees_all_equal((bad.params, bad.opt_state), (good.params, good.opt_state))
        assert (int(bad.step), int(bad.skipped), int(metrics['bad_run'])) == (2, 1, 1)
    again, _ = guarded_update(bad, ({'w': jnp.ones(3)}, {}), jnp.ones(()), optimizer)
    assert int(again.bad_run) == 0 and float(jnp.abs(again.params['w'] - bad.params['w']).max()) > 0


def test_training_steps_lower_the_loss_of_every_budget():
    params, batch = noisy_params(HYBRID, FLAT, 0), make_batch(HYBRID)
    pretrain = make_pretrain_step(HYBRID, optax.adam(1e-2), StepConfig(), balance_rate=1e-2)
    state = new_state(params, optax.adam(1e-2))
    losses = []
    for _ in range(20):
        state, metrics = pretrain(state, batch)
        losses.append(float(metrics['loss']))
    assert losses[-1] < 0.6 * losses[0]
    teacher = jax.tree.map(jnp.copy, state.params)
    step = make_elastic_step(HYBRID, HYBRID_BUDGETS, (1.0, 1.0, 1.0), optax.adam(3e-3), StepConfig())
    state, first, last = new_state(state.params, optax.adam(3e-3)), None, None
    for _ in range(15):
        state, last = step(state, teacher, batch)
        first = first or last
    assert float(first['loss/full']) < 1e-5, 'the full budget starts as its own teacher'
    for name in ('mid', 'small'):
        assert float(last[f'loss/{name}']) < 0.7 * float(first[f'loss/{name}'])


def test_expert_biases_move_towards_equal_load():
    params = {'layer_001': {'correction_bias': jnp.zeros((2, 2))}}
    load = jnp.asarray([0.7, 0.1, 0.1, 0.1])
    moved = balance_experts(params, {'expert_load/full/layer_001': load}, 0.01)
    np.testing.assert_allclose(moved['layer_001']['correction_bias'], [[-0.01, 0.01], [0.01, 0.01]])
