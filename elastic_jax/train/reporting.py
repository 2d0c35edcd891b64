"""What one step reports: progress, its line of metrics, router probabilities and expert loads."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from elastic_jax.errors import WorkError
from elastic_jax.observe.peak import utilisation
from elastic_jax.train.curriculum import Stage, draw_budgets
from elastic_jax.train.flops import step_flops

if TYPE_CHECKING:
    from elastic_jax.train.loop import Run


@dataclasses.dataclass
class StepReport:
    """Writes one step's metrics; called after the next step is dispatched, so that nothing waits for the device.

    `waited`: seconds for the batch. `begun`: when the device could begin, the step before done.
    """

    run: Run
    stage: Stage
    step: int
    stage_step: int
    metrics: dict[str, jax.Array]
    waited: float
    begun: float

    def __call__(self) -> None:
        run, plan = self.run, self.run.plan
        with run.clock.part('step'):
            values = jax.device_get(self.metrics)
        took = time.perf_counter() - self.begun
        run.profile.computed(self.step)
        if values['bad_run'] >= plan.config.max_bad_steps:
            run.store.wait()
            raise WorkError(
                f'{int(values["bad_run"])} steps in a row had a non-finite loss or gradient, the last at step {self.step}; the '
                f'checkpoint of step {run.store.latest()} is intact: lower the learning rate or look at the data, then rerun'
            )
        tokens = self.stage.batch_size * self.stage.context
        losses = {'loss': float(values['loss'])}
        pretraining = self.stage.kind == 'pretrain'
        drawn = () if pretraining else draw_budgets(self.stage, plan.budgets, self.stage_step - 1, plan.config.seed)
        if self.stage.kind == 'search':
            losses |= dict(zip((plan.budgets[n] for n in drawn), values['loss/drawn'].tolist(), strict=True))
        else:
            losses |= {name.removeprefix('loss/'): float(v) for name, v in values.items() if name.startswith('loss/')}
        speed = tokens / max(took, 1e-9)
        shown = {name: loss for name, loss in losses.items() if name != 'loss'} or losses
        run.progress.update(
            self.stage.name, self.stage_step, self.stage.steps, shown, speed, took if self.stage_step > 2 else 0.0
        )
        if self.step % plan.config.log_every and self.stage_step != self.stage.steps:
            return
        devices, flops = run.place.mesh.devices, step_flops(plan, self.stage, drawn, run.at.archs)
        named = {name if name == 'loss' else f'loss/{name}': loss for name, loss in losses.items()}
        run.writer.write(
            'train',
            self.step,
            stage=self.stage.name,
            stage_step=self.stage_step,
            **named,
            grad_norm=float(values['grad_norm']),
            skipped=int(values['skipped']),
            tokens_per_second=speed,
            seconds=took,
            data_seconds=self.waited,
            **utilisation(flops, took, devices.size, devices.flat[0].device_kind),
        )
        if self.stage_step != self.stage.steps:  # the stage's last line comes after its last save
            run.writer.write('goodput', self.step, **run.clock.goodput())
        _write_details(run, self.stage, self.step, values)


def _write_details(run: Run, stage: Stage, step: int, values: dict[str, np.ndarray]) -> None:
    """Router probabilities and expert loads, as lines of their own."""
    tree: dict[str, dict[str, Any]] = {'router': {}, 'expert_load': {}}
    shares = {}
    for key, value in values.items():
        kind, _, rest = key.partition('/')
        if kind in tree:
            budget, _, name = rest.partition('/')
            tree[kind].setdefault(budget, {})[name] = value
        elif kind == 'share':
            shares[rest] = value
    if tree['router']:
        choices = {axis.axis: axis.widths for axis in run.plan.grid}
        run.writer.write('router', step, stage=stage.name, probabilities=tree['router'], share=shares, choices=choices)
    if tree['expert_load']:
        run.writer.write('experts', step, load=tree['expert_load'])
