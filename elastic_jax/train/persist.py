"""What a run saves and how it comes back: the snapshot, and the store that turns it into checkpoint items."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from elastic_jax.arch import Arch
from elastic_jax.checkpoint.manager import CheckpointManager
from elastic_jax.checkpoint.manifest import Budget, Manifest
from elastic_jax.checkpoint.restore import read_manifest, restore_slice
from elastic_jax.cost import cost_of
from elastic_jax.errors import UserError, WorkError
from elastic_jax.model.params import abstract_params, init_params
from elastic_jax.nest.ordering import Ordering, ordering_hash
from elastic_jax.nest.relayout import relayout
from elastic_jax.nest.router import init_router
from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.processes import check_same, is_main, together
from elastic_jax.train.programs import abstract_state, abstract_teacher
from elastic_jax.train.setup import Plan
from elastic_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Where a run stands between two steps.

    Attributes:
      step: steps taken in all; stage, stage_step: the next step's place in the curriculum (`done` when there is none).
      state: the training state. router: the searched router, kept after the search for budgets in between.
      ordering, parent: set once the parent is ordered; archs: budget -> Arch, as far as known.
      data: state of the data iterator after the last consumed batch; None at the start of a stage.
      metrics: budget -> its latest held-out metrics.
    """

    step: int
    stage: str
    stage_step: int
    state: TrainState
    router: Any
    ordering: Ordering
    parent: Arch
    archs: dict[str, Arch]
    data: dict[str, Any] | None
    metrics: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


def initial_params(plan: Plan, place: Placement) -> Any:
    """The parent's parameters: from `config.parent.checkpoint`, else random."""
    checkpoint, parent, layout = plan.config.parent.checkpoint, plan.parent, plan.layout
    if not checkpoint:
        return place.make(lambda key: init_params(key, parent, layout), jax.random.key(plan.config.seed))
    stored_layout = read_manifest(checkpoint).layout
    as_stored = Placement(place.mesh, parent, stored_layout)
    shardings = as_stored.shardings(abstract_params(parent, stored_layout))
    params = restore_slice(checkpoint, parent, shardings, jnp.float32)  # imports may be bfloat16
    if stored_layout == layout:
        return params
    return place.make(lambda p: relayout(p, parent, stored_layout, layout), params)


class Store:
    """Saves and restores snapshots in a workdir."""

    def __init__(self, workdir: epath.Path, plan: Plan, place: Placement):
        self.plan, self.workdir, self.place = plan, workdir, place
        self.manager = CheckpointManager(workdir, keep=plan.config.checkpoint.keep)
        self.last: int | None = None
        self.parent_hash = ''  # of the teacher whose logits are cached

    def latest(self) -> int | None:
        return self.manager.latest()

    def check(self) -> None:
        self.manager.check()

    def wait(self) -> None:
        self.manager.wait()

    def close(self) -> None:
        self.manager.close()

    def save(self, at: Snapshot) -> None:
        """Saves in the background; a step that is there already is left as it is."""
        if at.step == self.last:
            return
        counters = {'step': at.state.step, 'skipped': at.state.skipped, 'bad_run': at.state.bad_run}
        opt_state = {'optimizer': at.state.opt_state, 'router': at.state.router_opt_state, 'counters': counters}
        self.manager.save(
            at.step,
            params=at.state.params,
            opt_state=opt_state,
            router=at.state.router or at.router,
            ordering=at.ordering,
            data=at.data or {},
            manifest=self._manifest(at),
        )
        self.last = at.step

    def describe_anew(self, at: Snapshot) -> None:
        """Waits for the checkpoint of the step and writes its manifest again, whose scores were not known when it was saved."""
        self.wait()
        if is_main():
            self.manager.replace_manifest(at.step, self._manifest(at))

    def save_parent(self, params: Any, parent: Arch, ordering: Ordering) -> None:
        """Pins the ordered parent, the frozen teacher, in `WORKDIR/parent`."""
        first = next(stage for stage in self.plan.stages if stage.kind != 'pretrain')
        state = TrainState(*(None,) * 7)
        at = Snapshot(first.start, first.name, 0, state, {}, ordering, parent, {'full': parent}, None)
        self.manager.save_parent(params, self._manifest(at))

    def restore_parent(self) -> Any:
        """The teacher, in the dtype that it is computed in."""
        return self.manager.restore_parent(abstract_teacher(self.plan, self.place))

    def _manifest(self, at: Snapshot) -> Manifest:
        plan = self.plan
        budgets = {
            name: Budget(arch, cost_of(arch, plan.config.metric_context).to_json(), at.metrics.get(name, {}))
            for name, arch in at.archs.items()
        }
        return Manifest(
            arch=at.parent,
            layout=plan.layout,
            budgets=budgets,
            step=at.step,
            stage=at.stage,
            stage_step=at.stage_step,
            rng=[plan.config.seed],
            dtypes={'params': 'float32', 'compute': plan.config.dtype},
            tokenizer=plan.tokenizer.spec,
            hf_config=self._hf_config(),
            data_fingerprint=(at.data or {}).get('fingerprint', ''),
            ordering_hash=ordering_hash(at.ordering),
            experiment=plan.config.name,
            extra={
                'targets': plan.targets,
                'metric': plan.config.metric,
                'teacher': plan.config.teacher,
                'parent_hash': self.parent_hash,
                'context': max(stage.context for stage in plan.stages),
            },
        )

    def _hf_config(self) -> dict[str, Any] | None:
        checkpoint = self.plan.config.parent.checkpoint
        return read_manifest(checkpoint).hf_config if checkpoint else None

    def restore_newest(self, say: Callable[[str], None]) -> Snapshot | None:
        """The snapshot of the newest good checkpoint, None in a new workdir; damaged ones are said and passed over.

        Raises: UserError when there are checkpoints and none of them is good.
        """
        steps = self.manager.steps()
        check_same({f'list of checkpoints in {self.manager.root}': str(steps)}, 'take a --workdir that all hosts share')
        problem = None
        for step in steps:
            try:
                # Damage may lie in one process's part alone; all of them must go on from the same step.
                return together(lambda step=step: self._restore(step, read_manifest(self.manager.root / str(step))))
            except UserError as error:
                problem = problem or error
                say(f'checkpoint {step} is damaged and passed over: {error}')
        if problem:
            raise UserError(f'no checkpoint in {self.manager.root} is good: {problem}; restore one, or take another --workdir')
        return None

    def _restore(self, step: int, manifest: Manifest) -> Snapshot:
        plan = self.plan
        if dataclasses.replace(manifest.arch, ranking=()) != plan.parent or manifest.layout != plan.layout:
            raise WorkError(f'{self.workdir} holds a checkpoint of another model; take another --workdir or the same config')
        stages = {stage.name: stage for stage in plan.stages}
        stage = stages.get(manifest.stage, plan.stages[-1])
        searching, after_search = stage.kind == 'search', any(other.kind == 'search' for other in plan.stages)
        router = lambda: init_router(jax.random.key(0), plan.grid, len(plan.budgets))
        state = abstract_state(plan, stage, self.place)
        counters = {'step': state.step, 'skipped': state.skipped, 'bad_run': state.bad_run}
        ordered = stage.kind != 'pretrain'
        saved_router = self.place.abstract(jax.eval_shape(router)) if ordered and after_search else {}
        abstract = {
            'params': state.params,
            'opt_state': {'optimizer': state.opt_state, 'router': state.router_opt_state, 'counters': counters},
            'router': saved_router,
            'ordering': None,
        }
        items = self.manager.restore(step, abstract)
        opt_state = items['opt_state']
        state = TrainState(
            params=items['params'],
            opt_state=opt_state['optimizer'],
            router=items['router'] if searching else {},
            router_opt_state=opt_state['router'],
            **opt_state['counters'],
        )
        self.last, self.parent_hash = step, manifest.extra.get('parent_hash', '')
        ordering = jax.tree.map(np.asarray, items['ordering'])
        archs = {name: budget.arch for name, budget in manifest.budgets.items()}
        metrics = {name: dict(budget.metrics) for name, budget in manifest.budgets.items()}
        data = items['data'] or None
        return Snapshot(
            step, manifest.stage, manifest.stage_step, state, items['router'], ordering, manifest.arch, archs, data, metrics
        )
