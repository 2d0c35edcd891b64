"""The compiled programs of a run: each stage's step for a mesh, and what it takes, without making any of it.

The loop runs these programs and `elastic plan` compiles the same ones for hardware that is not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.arch import Arch
from elastic_jax.model.params import abstract_params, init_params
from elastic_jax.nest.router import init_router
from elastic_jax.parallel.placement import Placement
from elastic_jax.train.curriculum import Stage, draw_budgets, loss_weights
from elastic_jax.train.setup import Plan
from elastic_jax.train.state import TrainState, new_state
from elastic_jax.train.step import make_elastic_step, make_pretrain_step, make_search_step

BATCH_KEYS = {
    'tokens': jnp.int32,
    'targets': jnp.int32,
    'segment_ids': jnp.int32,
    'positions': jnp.int32,
    'loss_mask': jnp.float32,
}


def batch_keys(plan: Plan, stage: Stage) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """What of a batch a stage's step takes: name -> (dtype, dimensions after [B, T])."""
    keys: dict[str, tuple[Any, tuple[int, ...]]] = {key: (dtype, ()) for key, dtype in BATCH_KEYS.items()}
    if plan.config.teacher == 'cached' and stage.kind != 'pretrain':
        k = plan.config.teacher_cache.k
        keys |= {'teacher_ids': (jnp.int32, (k,)), 'teacher_log_p': (jnp.float16, (k + 1,))}
    return keys


def needs_parent(plan: Plan, stage: Stage) -> bool:
    """Whether a stage computes with the frozen parent."""
    teacher = plan.config.teacher
    return (stage.kind == 'elastic' and teacher == 'frozen') or (stage.kind == 'search' and teacher != 'cached')


@dataclasses.dataclass(frozen=True)
class Program:
    """`fn(state, batch)` of a pretrain stage; `fn(state, teacher, batch)` of an elastic one; of a search also the indices of
    the drawn budgets and the noise. Returns (state, metrics). `abstract_args` describe the arguments, with their shardings.
    """

    fn: Any
    abstract_args: tuple[Any, ...]


def stage_program(
    plan: Plan, stage: Stage, archs: Mapping[str, Arch], place: Placement, drawn: tuple[int, ...] | None = None
) -> Program:
    """The step of a stage that trains the budgets with indices `drawn` (default: those of its first step).

    `archs` are the budgets' submodels, of an elastic stage; the parent is `place.parent`.
    """
    parent, optimizer = place.parent, plan.optimizer(stage)
    config = plan.step_config(stage, place.mesh if place.distributed else None)
    state, batch = abstract_state(plan, stage, place), abstract_batch(plan, stage, place)
    if stage.kind == 'pretrain':
        fn = make_pretrain_step(parent, optimizer, config, stage.config.balance_rate, stage.config.balance_loss)
        return Program(fn, (state, batch))
    drawn = draw_budgets(stage, plan.budgets, 0, plan.config.seed) if drawn is None else drawn
    teacher = abstract_teacher(plan, place) if needs_parent(plan, stage) else {}
    if stage.kind == 'search':
        fn = make_search_step(parent, plan.search_config(stage), optimizer, plan.router_optimizer(), config)
        whole = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=place.whole)
        drawn_K, noise_2 = whole((len(drawn),), jnp.int32), whole((2,), jnp.uint32)
        return Program(fn, (state, teacher, batch, drawn_K, noise_2))
    budgets = [(plan.budgets[i], archs[plan.budgets[i]]) for i in drawn]
    weights = loss_weights(stage, plan.budgets, drawn)
    fn = make_elastic_step(parent, budgets, weights, optimizer, config, plan.config.teacher)
    return Program(fn, (state, teacher, batch))


def abstract_state(plan: Plan, stage: Stage, place: Placement) -> TrainState:
    """What the state of a stage is, as ShapeDtypeStructs with shardings."""

    def build() -> TrainState:
        params = init_params(jax.random.key(0), plan.parent, plan.layout)
        if stage.kind != 'search':
            return new_state(params, plan.optimizer(stage))
        router = init_router(jax.random.key(0), plan.grid, len(plan.budgets))
        return new_state(params, plan.optimizer(stage), router, plan.router_optimizer())

    return place.abstract(jax.eval_shape(build))


def abstract_teacher(plan: Plan, place: Placement) -> Any:
    """The frozen parent: only ever computed with, so stored in the dtype that it is computed in."""
    return place.abstract(abstract_params(plan.parent, plan.layout, jnp.dtype(plan.config.dtype)))


def abstract_batch(plan: Plan, stage: Stage, place: Placement) -> dict[str, Any]:
    shape, sharding = (stage.batch_size, stage.context), place.batch_sharding
    describe = lambda dtype, more: jax.ShapeDtypeStruct((*shape, *more), dtype, sharding=sharding)
    return {key: describe(dtype, more) for key, (dtype, more) in batch_keys(plan, stage).items()}
