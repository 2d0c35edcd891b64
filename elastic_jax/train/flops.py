"""FLOPs of a step and of a stage, in closed form: for the utilisation, and for the time left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elastic_jax.arch import Arch
from elastic_jax.cost import flops_per_token, training_flops_per_token
from elastic_jax.train.curriculum import Stage, draw_budgets
from elastic_jax.train.programs import needs_parent
from elastic_jax.train.setup import Plan

DRAWS = 64


def step_flops(
    plan: Plan, stage: Stage, budgets_drawn: Sequence[int], archs: Mapping[str, Arch] | None = None, executed: bool = False
) -> float:
    """Matmul FLOPs of one step that trains the budgets with these indices, all micro-batches together.

    The teacher's forward pass where there is a frozen teacher, and three times the forward pass of what is trained: the parent
    (pretraining), a mask at full width per drawn budget (search), or the submodels. `archs` are the submodels as far as known;
    a budget not frozen yet counts as its target share of the parent. With `executed` what the CPU's program runs instead of
    what the mathematics needs (cost.py), recomputed blocks included; then all submodels must be known.
    """
    tokens = stage.batch_size * stage.context
    batch = stage.batch_size // stage.config.accumulate if executed else None
    teacher = needs_parent(plan, stage)
    known, unknown = [plan.parent] * len(budgets_drawn), 0.0
    if stage.kind == 'pretrain':
        known = [plan.parent]
    elif stage.kind == 'elastic':
        names, archs = [plan.budgets[n] for n in budgets_drawn], plan.by_hand | dict(archs or {})
        known = [archs[name] for name in names if name in archs]
        unknown = sum(plan.targets[name] for name in names if name not in archs)
    trained = training_flops_per_token(plan.parent, known, stage.context, teacher, executed and plan.config.remat, batch)
    return tokens * (trained + unknown * 3.0 * flops_per_token(plan.parent, stage.context))


def stage_flops(plan: Plan, stage: Stage) -> float:
    """FLOPs of all steps of a stage, before its submodels are known; of drawn budgets the mean of the first draws."""
    if stage.kind == 'pretrain':
        return stage.steps * step_flops(plan, stage, ())
    draws = [draw_budgets(stage, plan.budgets, n, plan.config.seed) for n in range(min(stage.steps, DRAWS))]
    return stage.steps * sum(step_flops(plan, stage, drawn) for drawn in draws) / len(draws)
