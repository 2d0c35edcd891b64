"""The three jitted training steps: pretraining the parent, searching widths with soft masks, training static slices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from elastic_jax.arch import Arch
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.collectives import WHOLE, Shards, total
from elastic_jax.model.context import Context, context_for
from elastic_jax.model.kernels import Target, target_of
from elastic_jax.model.losses import Students, cross_entropy_losses, kl_losses, top_k_kl_losses
from elastic_jax.nest.budgets import Grid, Metric
from elastic_jax.nest.masks import mask_params, softs
from elastic_jax.nest.router import Anneal, budget_loss, gumbel_softmax, router_logits, soft_masks
from elastic_jax.parallel.sharding import param_specs, shards, tree_shardings
from elastic_jax.train.gradients import Loss, Metrics, differentiable, loss_and_gradients
from elastic_jax.train.lockstep import Specs, Stack, lockstep
from elastic_jax.train.state import TrainState, guarded_update

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What all steps share. `accumulate` splits a batch into that many micro-batches, summed before the update.

    `remat` and `scan` are those of a Stack, `kernels` is one of `model/kernels.py:KERNELS`; without a mesh everything is on JAX's
    default device.
    """

    layout: Layout = FLAT
    dtype: Any = jnp.float32
    remat: bool = False
    chunk: int = 512
    accumulate: int = 1
    scan: bool = False
    kernels: str = 'auto'
    mesh: Mesh | None = None

    @property
    def target(self) -> Target:
        return target_of(self.kernels, None if self.mesh is None else self.mesh.devices.flat[0])

    def shards(self, parent: Arch) -> Shards:
        return WHOLE if self.mesh is None else shards(parent, self.layout, self.mesh)

    def specs(self, parent: Arch) -> Specs | None:
        return None if self.mesh is None else param_specs(parent, self.layout, self.mesh)

    def stack(self, parent: Arch) -> Stack:
        return Stack(self.layout, self.remat, self.scan, self.specs(parent))

    def teacher_stack(self, parent: Arch) -> Stack:
        """Of a pass without gradients: there is nothing to keep or to compute again."""
        return Stack(self.layout, False, self.scan, self.specs(parent))

    def constrain(self, state: TrainState, parent: Arch) -> TrainState:
        """The state, stored as the parameters are: what a step returns is what the next one takes."""
        if self.mesh is None:
            return state
        return jax.lax.with_sharding_constraint(state, tree_shardings(state, self.specs(parent), self.mesh))


def step_context(batch: Batch, arch: Arch, config: StepConfig) -> Context:
    """What the blocks of a step share."""
    return context_for(
        batch['tokens'],
        batch['segment_ids'],
        batch['positions'],
        norm_eps=arch.norm_eps,
        dtype=config.dtype,
        shards=config.shards(arch),
        target=config.target,
    )


def pretrain_loss(arch: Arch, config: StepConfig, auxiliary_weight: float = 0.0) -> Loss:
    """Cross-entropy of the parent, plus the experts' auxiliary load-balancing loss."""

    def loss_fn(params: Any, fixed: Any, batch: Batch, count: jax.Array) -> tuple[jax.Array, Metrics]:
        context = step_context(batch, arch, config)
        students, [aux] = lockstep(params, batch['tokens'], arch, [arch], context, config.stack(arch))
        shared = (batch['loss_mask'], count, config.chunk, context.shards.of('vocab'))
        loss, _ = cross_entropy_losses([students], [1.0], batch['targets'], *shared)
        metrics = {'loss': loss, **_loads(aux, 'full')}
        balance = [block['balance_loss'] for block in aux.values() if 'balance_loss' in block]
        share = total(jnp.sum(batch['loss_mask']), context.shards.data) / count
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
) -> Loss:
    """Weighted sum of the budgets' losses, each on its static slice, all in lockstep.

    `teacher`: 'frozen' distils from the frozen parent's logits (the fixed parameters); 'cached' from its top k, which the batch
    carries; 'self' from the full budget's, which itself learns by cross-entropy (the full budget must come first); 'none' trains
    every budget by cross-entropy.
    """
    names, archs = zip(*budgets, strict=True)

    def loss_fn(params: Any, teacher_params: Any, batch: Batch, count: jax.Array) -> tuple[jax.Array, Metrics]:
        context = step_context(batch, parent, config)
        students, auxes = lockstep(params, batch['tokens'], parent, archs, context, config.stack(parent))
        shared = (batch['loss_mask'], count, config.chunk, context.shards.of('vocab'))
        if teacher in ('frozen', 'cached'):
            loss, losses_N = distillation([students], weights, teacher_params, batch, count, parent, context, config)
        elif teacher == 'self' and len(archs) > 1:
            full, small = (Students(hiddens, students.kernel_DxV) for hiddens in (students.hiddens[:1], students.hiddens[1:]))
            own_loss, own_N = cross_entropy_losses([full], weights[:1], batch['targets'], *shared)
            from_full = (full.hiddens[0], full.kernel_DxV)
            loss, losses_N = kl_losses([small], weights[1:], from_full, *shared, context.target)
            loss, losses_N = own_loss + loss, jnp.concatenate([own_N, losses_N])
        else:
            loss, losses_N = cross_entropy_losses([students], weights, batch['targets'], *shared)
        metrics = {f'loss/{name}': losses_N[n] for n, name in enumerate(names)}
        for name, aux in zip(names, auxes, strict=True):
            metrics |= _loads(aux, name)
        return loss, metrics

    return loss_fn


def distillation(
    students: Sequence[Students],
    weights: Sequence[float],
    teacher_params: Any,
    batch: Batch,
    count: jax.Array,
    parent: Arch,
    context: Context,
    config: StepConfig,
) -> tuple[jax.Array, jax.Array]:
    """`kl_losses` from the frozen parent: from its cached top k where the batch carries them, else computed here."""
    shared = (batch['loss_mask'], count, config.chunk, context.shards.of('vocab'))
    if 'teacher_ids' in batch:
        return top_k_kl_losses(students, weights, batch['teacher_ids'], batch['teacher_log_p'], *shared)
    teacher = teacher_head(teacher_params, batch, parent, context, config)
    return kl_losses(students, weights, teacher, *shared, context.target)


def teacher_head(params: Any, batch: Batch, parent: Arch, context: Context, config: StepConfig) -> tuple[jax.Array, jax.Array]:
    """(final hidden states, unembedding) of the frozen parent."""
    students, _ = lockstep(params, batch['tokens'], parent, [parent], context, config.teacher_stack(parent))
    return students.hiddens[0], students.kernel_DxV


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


def masked_loss(parent: Arch, config: StepConfig) -> Loss:
    """Distillation of parents under soft masks: learned are (masked parameters, Softs by block) of each."""

    def loss_fn(learned: Any, teacher_params: Any, batch: Batch, count: jax.Array) -> tuple[jax.Array, Metrics]:
        context, stack = step_context(batch, parent, config), config.stack(parent)
        run = lambda masked, soft: lockstep(masked, batch['tokens'], parent, [parent], context, stack, [soft])[0]
        students, weights = [run(*own) for own in learned], [1.0] * len(learned)
        loss, losses_K = distillation(students, weights, teacher_params, batch, count, parent, context, config)
        return loss, {'loss/drawn': losses_K}

    return loss_fn


def search_loss(parent: Arch, search: SearchConfig, config: StepConfig) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Distillation of the drawn budgets under soft masks at full width, plus the budget loss of all of them.

    The masks multiply the parameters as they are stored, before they are fetched; what is between masked parameters and loss
    is one differentiable function over the mesh.
    """
    names = [name for name, _ in search.targets]
    distilled = differentiable(loss_and_gradients(masked_loss(parent, config), parent, config))

    def loss_fn(
        learned: tuple[Any, Any], teacher_params: Any, batch: Batch, drawn_K: jax.Array, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        params, router = learned
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
        drawn = []
        for k in range(drawn_K.shape[0]):
            own = jax.tree.map(lambda leaf, k=k: leaf[drawn_K[k]], stacked)
            masks = soft_masks(parent, search.grid, own, config.layout)
            drawn.append((mask_params(params, parent, masks, config.layout), softs(parent, masks, config.layout)))
        loss, more = distilled(drawn, teacher_params, batch)
        return loss + search.budget_weight * sum(misses), metrics | more

    return loss_fn


def make_pretrain_step(
    arch: Arch,
    optimizer: optax.GradientTransformation,
    config: StepConfig,
    balance_rate: float = 0.0,
    auxiliary_weight: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Jitted step of the parent's pretraining; experts are balanced by their correction biases and/or the auxiliary loss."""
    gradients = loss_and_gradients(pretrain_loss(arch, config, auxiliary_weight), arch, config)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, metrics, grads = gradients(state.params, {}, batch)
        state, more = guarded_update(state, (grads, {}), loss, optimizer)
        if balance_rate:
            state = state.replace(params=balance_experts(state.params, metrics, balance_rate))
        return config.constrain(state, arch), metrics | more

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
    gradients = loss_and_gradients(elastic_loss(parent, budgets, weights, config, teacher), parent, config)

    def step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, metrics, grads = gradients(state.params, teacher_params, batch)
        state, more = guarded_update(state, (grads, {}), loss, optimizer)
        return config.constrain(state, parent), {'loss': loss, **metrics, **more}

    return jax.jit(step, donate_argnums=0)


def make_search_step(
    parent: Arch,
    search: SearchConfig,
    optimizer: optax.GradientTransformation,
    router_optimizer: optax.GradientTransformation,
    config: StepConfig,
) -> Callable[[TrainState, Any, Batch, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """Jitted step of a search stage: (state, teacher's parameters, batch, indices of drawn budgets [K], noise).

    `noise_2` is the data of a random key: plain integers, which every process of several may hand in.
    """
    loss_fn = search_loss(parent, search, config)

    def step(
        state: TrainState, teacher_params: Any, batch: Batch, drawn_K: jax.Array, noise_2: jax.Array
    ) -> tuple[TrainState, Metrics]:
        learned = (state.params, state.router)
        gradients = jax.value_and_grad(loss_fn, has_aux=True)
        key = jax.random.wrap_key_data(noise_2)
        (loss, metrics), grads = gradients(learned, teacher_params, batch, drawn_K, key, state.step)
        state, more = guarded_update(state, grads, loss, optimizer, router_optimizer)
        return config.constrain(state, parent), {'loss': loss, **metrics, **more}

    return jax.jit(step, donate_argnums=0)
