"""The three jitted training steps: pretraining the parent, searching widths with soft masks, training static slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from elastic_jax.arch import Arch
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.context import Context, context_for
from elastic_jax.model.decoder import hidden_states, unembedding
from elastic_jax.model.losses import cross_entropy_losses, kl_losses
from elastic_jax.nest.budgets import Grid, Metric
from elastic_jax.nest.masks import mask_params, softs
from elastic_jax.nest.router import Anneal, budget_loss, gumbel_softmax, router_logits, soft_masks
from elastic_jax.train.lockstep import lockstep
from elastic_jax.train.state import TrainState, guarded_update

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Loss = Callable[[Any, Batch, jax.Array], tuple[jax.Array, Metrics]]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What all steps share. `accumulate` splits a batch into that many micro-batches, summed before the update."""

    layout: Layout = FLAT
    dtype: Any = jnp.float32
    remat: bool = False
    chunk: int = 512
    accumulate: int = 1


def _context(batch: Batch, arch: Arch, config: StepConfig) -> Context:
    return context_for(batch['tokens'], batch['segment_ids'], batch['positions'], norm_eps=arch.norm_eps, dtype=config.dtype)


def pretrain_loss(arch: Arch, config: StepConfig, auxiliary_weight: float = 0.0) -> Loss:
    """Cross-entropy of the parent, plus the experts' auxiliary load-balancing loss."""

    def loss_fn(params: Any, batch: Batch, count: jax.Array) -> tuple[jax.Array, Metrics]:
        hidden_BxTxD, aux = hidden_states(params, batch['tokens'], arch, _context(batch, arch, config), remat=config.remat)
        heads = [(hidden_BxTxD, unembedding(params))]
        loss = cross_entropy_losses(heads, batch['targets'], batch['loss_mask'], count, config.chunk)[0]
        metrics = {'loss': loss, **_loads(aux, 'full')}
        balance = [block['balance_loss'] for block in aux.values() if 'balance_loss' in block]
        share = jnp.sum(batch['loss_mask']) / count
        return loss + auxiliary_weight * share * sum(balance, jnp.zeros(())), metrics

    return loss_fn


def _loads(aux: dict[str, dict[str, jax.Array]], budget: str) -> Metrics:
    return {f'expert_load/{budget}/{name}': block['expert_load'] for name, block in aux.items() if 'expert_load' in block}


def elastic_loss(
    parent: Arch,
    budgets: Sequence[tuple[str, Arch]],
    weights: Sequence[float],
    config: StepConfig,
    teacher: str = 'frozen',
) -> Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, Metrics]]:
    """Weighted sum of the budgets' losses, each on its static slice, all in lockstep.

    `teacher`: 'frozen' distils from the frozen parent's logits; 'self' from the full budget's, which itself learns by
    cross-entropy (the full budget must come first); 'none' trains every budget by cross-entropy.
    """
    names, archs = zip(*budgets, strict=True)

    def loss_fn(params: Any, teacher_params: Any, batch: Batch, count: jax.Array) -> tuple[jax.Array, Metrics]:
        context = _context(batch, parent, config)
        heads, auxes = lockstep(params, batch['tokens'], parent, archs, context, config.layout, config.remat)
        by_next_token = lambda students: cross_entropy_losses(students, batch['targets'], batch['loss_mask'], count, config.chunk)
        if teacher == 'frozen':
            hidden_BxTxD, _ = hidden_states(teacher_params, batch['tokens'], parent, context)
            losses = kl_losses(heads, (hidden_BxTxD, unembedding(teacher_params)), batch['loss_mask'], count, config.chunk)
        elif teacher == 'self' and len(heads) > 1:
            small = kl_losses(heads[1:], heads[0], batch['loss_mask'], count, config.chunk)
            losses = jnp.concatenate([by_next_token(heads[:1]), small])
        else:
            losses = by_next_token(heads)
        metrics = {f'loss/{name}': losses[n] for n, name in enumerate(names)}
        for name, aux in zip(names, auxes, strict=True):
            metrics |= _loads(aux, name)
        return losses @ jnp.asarray(weights, jnp.float32), metrics

    return loss_fn


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What a search stage adds. `per_step` budgets are drawn every step; the program is the same whichever they are."""

    grid: Grid
    targets: tuple[tuple[str, float], ...]
    measure: Metric
    anneal: Anneal
    steps: int
    budget_weight: float = 1.0
    dead_zone: float = 0.05
    anchor: float = 10.0


def search_loss(parent: Arch, search: SearchConfig, config: StepConfig) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Distillation of the drawn budgets under soft masks at full width, plus the budget loss of all of them."""
    names = [name for name, _ in search.targets]

    def loss_fn(
        learned: tuple[Any, Any],
        teacher_params: Any,
        batch: Batch,
        count: jax.Array,
        drawn_K: jax.Array,
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, Metrics]:
        params, router = learned
        context = _context(batch, parent, config)
        temperature, scale = search.anneal.at(step / search.steps)
        probabilities, misses, metrics = [], [], {}
        for n, (name, target) in enumerate(search.targets):
            logits = router_logits(router, search.grid, jax.nn.one_hot(n, len(names)))
            sampled = gumbel_softmax(jax.random.fold_in(key, n), logits, temperature, scale)
            miss, share = budget_loss(parent, search.grid, sampled, target, search.measure, search.dead_zone, search.anchor)
            probabilities.append(sampled)
            misses.append(miss)
            metrics |= {f'budget_loss/{name}': miss, f'share/{name}': share}
            metrics |= {f'router/{name}/{axis}': jax.nn.softmax(scale * value) for axis, value in logits.items()}
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *probabilities)
        hidden_BxTxD, _ = hidden_states(teacher_params, batch['tokens'], parent, context)
        heads = []
        for k in range(drawn_K.shape[0]):
            own = jax.tree.map(lambda leaf, k=k: leaf[drawn_K[k]], stacked)
            masks = soft_masks(parent, search.grid, own, config.layout)
            masked = mask_params(params, parent, masks, config.layout)
            soft = softs(parent, masks, config.layout)
            heads.append((hidden_states(masked, batch['tokens'], parent, context, soft, config.remat)[0], unembedding(masked)))
        teacher = (hidden_BxTxD, unembedding(teacher_params))
        losses_K = kl_losses(heads, teacher, batch['loss_mask'], count, config.chunk)
        metrics['loss/drawn'] = losses_K
        share_of_batch = jnp.sum(batch['loss_mask']) / count
        return losses_K.sum() + search.budget_weight * share_of_batch * sum(misses), metrics

    return loss_fn


def accumulated(
    loss_fn: Callable[..., tuple[jax.Array, Metrics]], learned: Any, batch: Batch, pieces: int
) -> tuple[jax.Array, Metrics, Any]:
    """(loss, metrics, gradients) of `loss_fn(learned, batch, count)`, over micro-batches one after the other.

    Every micro-batch is divided by the whole batch's token count, so their sum is exactly the whole batch's loss.
    """
    count = jnp.maximum(jnp.sum(batch['loss_mask']), 1.0)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if pieces == 1:
        (loss, metrics), grads = value_and_grad(learned, batch, count)
        return loss, metrics, grads
    split = jax.tree.map(lambda x: x.reshape(pieces, x.shape[0] // pieces, *x.shape[1:]), batch)

    def add(total: Any, piece: Batch) -> tuple[Any, None]:
        (loss, metrics), grads = value_and_grad(learned, piece, count)
        return jax.tree.map(jnp.add, total, (loss, metrics, grads)), None

    shapes = jax.eval_shape(value_and_grad, learned, jax.tree.map(lambda x: x[0], split), count)
    (loss, metrics), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, (loss, metrics, grads), split)
    loss, metrics, grads = total
    averaged = {key: value if key.startswith('loss') else value / pieces for key, value in metrics.items()}
    return loss, averaged, grads


def make_pretrain_step(
    arch: Arch,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    balance_rate: float = 0.0,
    auxiliary_weight: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Jitted step of the parent's pretraining; experts are balanced by their correction biases and/or the auxiliary loss."""
    loss_fn = pretrain_loss(arch, config, auxiliary_weight)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, metrics, grads = accumulated(loss_fn, state.params, batch, config.accumulate)
        state, more = guarded_update(state, (grads, {}), loss, optimizer)
        if balance_rate:
            state = state.replace(params=balance_experts(state.params, metrics, balance_rate))
        return state, metrics | more

    return jax.jit(step, donate_argnums=0)


def balance_experts(params: Any, metrics: Metrics, rate: float) -> Any:
    """Moves each correction bias by `rate` towards equal load (auxiliary-loss-free balancing, arXiv 2408.15664)."""
    params = dict(params)
    for key, load_E in metrics.items():
        name = key.rpartition('/')[2]
        if key.startswith('expert_load/full/') and 'correction_bias' in params[name]:
            bias = params[name]['correction_bias']
            move = rate * jnp.sign(jnp.mean(load_E) - load_E).reshape(bias.shape)
            params[name] = params[name] | {'correction_bias': bias + jnp.where(jnp.isfinite(move), move, 0.0)}
    return params


def make_elastic_step(
    parent: Arch,
    budgets: Sequence[tuple[str, Arch]],
    weights: Sequence[float],
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    teacher: str = 'frozen',
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]:
    """Jitted step of an elastic stage with frozen widths: (state, teacher's parameters, batch)."""
    loss_fn = elastic_loss(parent, budgets, weights, config, teacher)

    def step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        own_loss = lambda params, piece, count: loss_fn(params, teacher_params, piece, count)
        loss, metrics, grads = accumulated(own_loss, state.params, batch, config.accumulate)
        state, more = guarded_update(state, (grads, {}), loss, optimizer)
        return state, {'loss': loss, **metrics, **more}

    return jax.jit(step, donate_argnums=0)


def make_search_step(
    parent: Arch,
    search: SearchConfig,
    optimizer: optax.GradientTransformation,
    router_optimizer: optax.GradientTransformation,
    config: StepConfig,
) -> Callable[[TrainState, Any, Batch, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """Jitted step of a search stage: (state, teacher's parameters, batch, indices of the drawn budgets [K], noise key)."""
    loss_fn = search_loss(parent, search, config)

    def step(
        state: TrainState, teacher_params: Any, batch: Batch, drawn_K: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        own_loss = lambda learned, piece, count: loss_fn(learned, teacher_params, piece, count, drawn_K, key, state.step)
        loss, metrics, grads = accumulated(own_loss, (state.params, state.router), batch, config.accumulate)
        state, more = guarded_update(state, grads, loss, optimizer, router_optimizer)
        return state, {'loss': loss, **metrics, **more}

    return jax.jit(step, donate_argnums=0)
