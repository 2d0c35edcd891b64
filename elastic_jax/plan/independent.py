"""What an elastic step is compared with: training one budget as a model of its own, distilled from the same frozen parent."""

from __future__ import annotations

from typing import Any

import jax

from elastic_jax.arch import Arch
from elastic_jax.errors import UserError
from elastic_jax.model.losses import cross_entropy_losses
from elastic_jax.model.params import init_params
from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.sharding import mesh_problems
from elastic_jax.train.curriculum import Stage
from elastic_jax.train.gradients import loss_and_gradients
from elastic_jax.train.lockstep import lockstep
from elastic_jax.train.programs import Program, abstract_batch, abstract_teacher, needs_parent
from elastic_jax.train.setup import Plan
from elastic_jax.train.state import TrainState, guarded_update, new_state
from elastic_jax.train.step import distillation, step_context


def independent_program(plan: Plan, stage: Stage, arch: Arch, place: Placement) -> Program:
    """The step of a run that has only `arch`: its own parameters and optimiser, and the teacher of the elastic run.

    Raises UserError when such a run could not be on this mesh.
    """
    problems = mesh_problems(arch, plan.layout, place.mesh)
    if problems:
        raise UserError('; '.join(problems))
    config = plan.step_config(stage, place.mesh if place.distributed else None)
    optimizer, parent = plan.optimizer(stage), plan.parent

    def loss_fn(params: Any, teacher: Any, batch: Any, count: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        context = step_context(batch, arch, config)
        students, _ = lockstep(params, batch['tokens'], arch, [arch], context, config.stack(arch))
        if plan.config.teacher in ('frozen', 'cached'):
            loss, _ = distillation([students], [1.0], teacher, batch, count, parent, context, config)
        else:
            shared = (batch['loss_mask'], count, config.chunk, context.shards.of('vocab'))
            loss, _ = cross_entropy_losses([students], [1.0], batch['targets'], *shared)
        return loss, {'loss/alone': loss}

    # Both are split over the mesh in the same way, as the mesh fits both.
    gradients = loss_and_gradients(loss_fn, arch, config)

    def step(state: TrainState, teacher: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        loss, metrics, grads = gradients(state.params, teacher, batch)
        state, more = guarded_update(state, (grads, {}), loss, optimizer)
        return config.constrain(state, arch), metrics | more

    own = Placement(place.mesh, arch, place.layout)
    build = lambda: new_state(init_params(jax.random.key(0), arch, plan.layout), optimizer)
    state = own.abstract(jax.eval_shape(build))
    teacher = abstract_teacher(plan, place) if needs_parent(plan, stage) else {}
    return Program(jax.jit(step, donate_argnums=0), (state, teacher, abstract_batch(plan, stage, place)))
