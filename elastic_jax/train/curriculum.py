"""The curriculum: the stages of a run, and which budgets a step trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from elastic_jax.arch import unknown_name
from elastic_jax.errors import UserError

KINDS = ('pretrain', 'search', 'elastic')
DONE = 'done'  # in the place of a stage's name: the curriculum is behind


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: `steps` steps of `batch_size` sequences of `context` tokens, from global step `start`."""

    name: str
    kind: str
    start: int
    steps: int
    context: int
    batch_size: int
    config: ml_collections.ConfigDict = dataclasses.field(compare=False, repr=False)

    @property
    def end(self) -> int:
        return self.start + self.steps


def make_stages(config: ml_collections.ConfigDict) -> tuple[Stage, ...]:
    """The stages that `config.curriculum` names, in its order. Raises UserError when one is missing or out of place."""
    stages, start = [], 0
    for name in config.curriculum:
        if name not in config.stages:
            raise UserError(unknown_name('stage in config.curriculum', name, list(config.stages)))
        stage = config.stages[name]
        if stage.kind not in KINDS:
            raise UserError(unknown_name(f'kind of stage {name}', stage.kind, list(KINDS)))
        if stage.steps < 1 or stage.batch_size < 1 or stage.context < 1:
            raise UserError(f'stage {name} needs steps, batch_size and context of at least 1')
        if stage.accumulate < 1 or stage.batch_size % stage.accumulate:
            raise UserError(
                f'stage {name}: batch_size={stage.batch_size} does not split into accumulate={stage.accumulate} equal parts'
            )
        if name == DONE or name in [own.name for own in stages]:
            # A checkpoint says by this name where its run goes on.
            why = 'is there twice' if name != DONE else 'is what the end of a run is called'
            raise UserError(f'config.curriculum: {name!r} {why}; give every stage a name of its own')
        stages.append(Stage(name, stage.kind, start, stage.steps, stage.context, stage.batch_size, stage))
        start += stage.steps
    order = [KINDS.index(stage.kind) for stage in stages]
    if not stages or order != sorted(order) or order.count(0) > 1 or order.count(1) > 1:
        kinds = ', '.join(stage.kind for stage in stages)
        raise UserError(f'config.curriculum has stages of kind: {kinds}; expected at most one pretrain, one search, then elastic')
    if stages[0].kind == 'pretrain' and config.parent.checkpoint:
        raise UserError(
            f'config.parent.checkpoint is given, so stage {stages[0].name} must not pretrain; take it out of config.curriculum'
        )
    if stages[0].kind != 'pretrain' and not config.parent.checkpoint:
        raise UserError('there is no parent: begin config.curriculum with a pretrain stage or give config.parent.checkpoint')
    return tuple(stages)


def probabilities_of(stage: Stage, budgets: Sequence[str]) -> np.ndarray:
    """The stage's probability of each budget, [N], summing to 1; uniform when the config names none."""
    given = stage.config.probabilities.to_dict()
    for name in given:
        if name not in budgets:
            raise UserError(unknown_name(f'budget in stages.{stage.name}.probabilities', name, list(budgets)))
    good = all(isinstance(value, int | float) and 0 <= value < np.inf for value in given.values())
    if given and not (good and any(given.values())):
        raise UserError(f'stages.{stage.name}.probabilities must be numbers of at least 0 and not all 0; got {given}')
    values = np.asarray([given.get(name, 0.0) for name in budgets] if given else np.ones(len(budgets)), np.float64)
    return values / values.sum()


def check_draws(stage: Stage, budgets: Sequence[str]) -> None:
    """Raises UserError when the stage cannot draw its budgets."""
    if stage.config.mode not in ('weighted', 'sampled'):
        raise UserError(unknown_name(f'mode of stage {stage.name}', stage.config.mode, ['weighted', 'sampled']))
    possible = int((probabilities_of(stage, budgets) > 0).sum())
    if (stage.config.mode == 'sampled' or stage.kind == 'search') and not 1 <= stage.config.per_step <= possible:
        raise UserError(
            f'stages.{stage.name}.per_step={stage.config.per_step}, but {possible} budgets have a probability above 0'
        )


def check_self_teacher(stage: Stage, targets: Mapping[str, float]) -> None:
    """Raises UserError when a step of the stage may lack the full budget, from which `teacher='self'` distils the others."""
    budgets, config = tuple(targets), stage.config
    probabilities = probabilities_of(stage, budgets)
    if config.mode == 'weighted':
        always = probabilities[0] > 0
    else:
        always = config.sandwich or (probabilities[0] > 0 and config.per_step == (probabilities > 0).sum())
    if targets[budgets[0]] < 1.0 or not always:
        raise UserError(
            f"teacher='self' distils from the full budget, but stages.{stage.name} does not train one in every step; give a "
            f"budget of 1.0 a probability above 0, with stages.{stage.name}.mode='weighted' or sandwich=True"
        )


def draw_budgets(stage: Stage, budgets: Sequence[str], stage_step: int, seed: int) -> tuple[int, ...]:
    """Indices of the budgets that one step trains, ascending; a function of seed and step, so every host draws the same.

    In 'weighted' mode all budgets with a probability; in 'sampled' mode `per_step` distinct ones drawn with the stage's
    probabilities, and with `sandwich` the largest and smallest as well.
    """
    probabilities = probabilities_of(stage, budgets)
    if stage.config.mode == 'weighted' and stage.kind == 'elastic':
        return tuple(int(n) for n in np.flatnonzero(probabilities))
    rng = np.random.default_rng([seed, stage.start, stage_step])
    drawn = set(rng.choice(len(budgets), stage.config.per_step, replace=False, p=probabilities).tolist())
    if stage.config.sandwich and stage.kind == 'elastic':
        drawn |= {0, len(budgets) - 1}
    return tuple(sorted(drawn))


def loss_weights(stage: Stage, budgets: Sequence[str], drawn: Sequence[int]) -> tuple[float, ...]:
    """Weight of each drawn budget's loss; they sum to 1.

    Weighted mode weighs by probability. Sampled mode weighs equally: the draw has already done it.
    """
    if stage.config.mode == 'weighted':
        probabilities = probabilities_of(stage, budgets)
        return tuple(float(probabilities[n] / probabilities[list(drawn)].sum()) for n in drawn)
    return (1.0 / len(drawn),) * len(drawn)
