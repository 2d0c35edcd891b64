"""The main job: from a config and a workdir to one elastic checkpoint.

Order of initialisation: resume from the workdir's newest good checkpoint; else start from `config.parent.checkpoint`; else from
scratch. Order inside the loop: evaluate, save (state and data position together), next batch, step, write the metrics of the
step before. A checkpoint of step N holds all that step N needs, so a killed run resumes bit for bit.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from elastic_jax.arch import Arch
from elastic_jax.cost import cost_of
from elastic_jax.data.pipeline import BatchIterator, load_store, make_iterator
from elastic_jax.metrics import MetricsWriter
from elastic_jax.nest.freeze import freeze
from elastic_jax.nest.ordering import Ordering
from elastic_jax.nest.router import init_router
from elastic_jax.train import persist
from elastic_jax.train.calibrate import order_parent
from elastic_jax.train.curriculum import Stage, draw_budgets, loss_weights
from elastic_jax.train.finish import Evaluator, finish
from elastic_jax.train.persist import Snapshot
from elastic_jax.train.progress import RunProgress
from elastic_jax.train.reporting import StepReport
from elastic_jax.train.setup import Plan, hand_archs, make_plan
from elastic_jax.train.signals import StopOnSignal, Stopped
from elastic_jax.train.state import TrainState, new_state
from elastic_jax.train.step import make_elastic_step, make_pretrain_step, make_search_step
from elastic_jax.train.workdir import claim_workdir, keep_tokenizer


@dataclasses.dataclass
class Run:
    """The handles of a run in progress and where it stands."""

    plan: Plan
    workdir: epath.Path
    store: persist.Store
    writer: MetricsWriter
    progress: RunProgress
    evaluator: Evaluator
    at: Snapshot
    restored: int | None = None
    teacher: Any = None
    stop_requested: bool = False


def train(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Runs or resumes the experiment in `workdir` until its curriculum is done and its report written.

    Raises: UserError for a bad config or another experiment's workdir, WorkError when the training itself fails, Stopped
    after SIGTERM, when everything is saved.
    """
    plan = make_plan(config)
    for split in ('train', 'heldout'):
        load_store(config.data, split)  # a corpus that cannot be read is said before anything is written
    workdir = epath.Path(workdir)
    claim_workdir(workdir, config)
    keep_tokenizer(workdir, config.data.tokenizer)
    if config.compilation_cache:
        jax.config.update('jax_compilation_cache_dir', config.compilation_cache)
    store = persist.Store(workdir, plan)
    try:
        restored = store.restore_newest()
        latest = None if restored is None else restored.step
        with RunProgress({stage.name: _work(plan, stage) for stage in plan.stages}) as progress:
            at = restored or _begin(plan, store, progress.say)
            writer = MetricsWriter(workdir, latest)
            if restored is None:
                writer.write('stage', 0, stage=plan.stages[0].name, event='start')
            evaluator = Evaluator(plan, writer)
            run = Run(plan, workdir, store, writer, progress, evaluator, at, latest)
            if restored:
                progress.say(f'resuming {workdir} at step {latest} of {plan.steps}')
            with StopOnSignal(run):
                _run_stages(run)
            store.wait()
            finish(workdir, progress.say)
    finally:
        store.close()


def _work(plan: Plan, stage: Stage) -> float:
    """FLOPs of a stage, roughly: what the time left is told from."""
    full = 3.0 * cost_of(plan.parent, stage.context).flops_per_token
    passes = 1.0
    if stage.kind == 'search':
        passes = stage.config.per_step + 1 / 3
    elif stage.kind == 'elastic':
        trained = plan.targets.values() if stage.config.mode == 'weighted' else [1.0] * stage.config.per_step
        passes = sum(trained) + 1 / 3
    return passes * full * stage.steps * stage.batch_size * stage.context


def _begin(plan: Plan, store: persist.Store, say: Callable[[str], None]) -> Snapshot:
    """The start of a new run: random parameters for the pretrain stage, or an existing parent, ordered."""
    first = plan.stages[0]
    params = store.initial_params()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    say(f'parent {plan.parent.pattern}: {parameters:,} parameters on {jax.device_count()} {jax.default_backend()} device(s)')
    if first.kind == 'pretrain':
        state = new_state(params, plan.optimizer(first))
        return Snapshot(0, first.name, 0, state, {}, {}, plan.parent, {'full': plan.parent}, None)
    at = _order(plan, store, params, 0, first, say)
    store.save(at)
    return at


def _order(plan: Plan, store: persist.Store, params: Any, step: int, stage: Stage, say: Callable[[str], None]) -> Snapshot:
    """Orders the parent, pins it as the teacher, and stands before the first elastic stage."""
    params, ordering, parent = order_parent(params, plan.parent, plan, say)
    archs = {'full': parent} | hand_archs(plan.config, parent, plan.layout)
    store.save_parent(params, parent, ordering)
    return _enter(plan, stage, step, params, {}, ordering, parent, archs)


def _enter(
    plan: Plan, stage: Stage, step: int, params: Any, router: Any, ordering: Ordering, parent: Arch, archs: dict[str, Arch]
) -> Snapshot:
    """The snapshot at the start of a stage after pretraining."""
    if stage.kind == 'search':
        router = init_router(jax.random.key(plan.config.seed + 2), plan.grid, len(plan.budgets))
        state = new_state(params, plan.optimizer(stage), router, plan.router_optimizer())
    else:
        state = new_state(params, plan.optimizer(stage))
    return Snapshot(step, stage.name, 0, state, router, ordering, parent, archs, None)


def _teacher(run: Run) -> Any:
    if run.teacher is None:
        run.teacher = run.store.restore_parent()
    return run.teacher


def _run_stages(run: Run) -> None:
    names = [stage.name for stage in run.plan.stages]
    if run.at.stage == persist.DONE:
        return
    for index in range(names.index(run.at.stage), len(names)):
        stage = run.plan.stages[index]
        _run_stage(run, stage)
        run.writer.write('stage', run.at.step, stage=stage.name, event='end')
        following = run.plan.stages[index + 1] if index + 1 < len(names) else None
        run.at = _leave(run, stage, following)
        if following is not None:
            # With the checkpoint still to come: a resumed run finds the line there, or writes it again.
            run.writer.write('stage', run.at.step, stage=following.name, event='start')
        run.store.save(run.at)
        run.writer.saved(run.at.step)


def _leave(run: Run, stage: Stage, following: Stage | None) -> Snapshot:
    """What a finished stage hands to the next one."""
    plan, at = run.plan, run.at
    if following is None:
        metrics = run.evaluator.final(at, _teacher(run))
        return dataclasses.replace(at, stage=persist.DONE, stage_step=0, data=None, metrics=metrics)
    if stage.kind == 'pretrain':
        return _order(plan, run.store, at.state.params, at.step, following, run.progress.say)
    archs, router = at.archs, at.router
    if stage.kind == 'search':
        router = at.state.router
        frozen = freeze(router, plan.grid, at.parent, plan.targets, plan.measure, plan.config.tolerance)
        archs = {name: result.arch for name, result in frozen.items()}
        described = {}
        for name, result in frozen.items():
            described[name] = {
                'target': result.target,
                'argmax_share': result.argmax_share,
                'share': result.share,
                'note': result.note,
                'widths': result.arch.widths(),
            }
            within = abs(result.miss) <= plan.config.tolerance
            reason = '' if within else f': misses by {result.miss:+.1%}, {result.note}'
            run.progress.say(f'{name}: {result.share:.1%} of the parent for a budget of {result.target:.1%}{reason}')
        run.writer.write('frozen', at.step, budgets=described)
        run.evaluator.hardening(run.at, archs, router)
    return _enter(plan, following, at.step, at.state.params, router, at.ordering, at.parent, archs)


def _run_stage(run: Run, stage: Stage) -> None:
    plan, config = run.plan, run.plan.config
    batches = make_iterator(
        config.data, split='train', batch_size=stage.batch_size, context=stage.context, seed=config.seed + stage.start
    )
    if run.at.data is not None:
        batches.set_state(run.at.data)
    # Committed from the first step on: otherwise the second call, on the first one's outputs, would compile once more.
    run.at = dataclasses.replace(run.at, state=jax.device_put(run.at.state, jax.local_devices()[0]))
    step_fn = _step_function(run, stage)
    pending: Callable[[], None] | None = None
    while run.at.stage_step < stage.steps:
        at = run.at
        fresh = at.stage_step > 0 and at.step != run.restored
        evaluating = fresh and config.eval.every and at.step % config.eval.every == 0
        stopping = run.stop_requested  # looked at once: the signal may come at any moment
        saving = stopping or (fresh and at.step % config.checkpoint.every == 0)
        if pending is not None and (saving or evaluating):
            # A checkpoint of step N comes after the line of step N, which a resumed run would not write again.
            pending()
            pending = None
        if evaluating:
            run.evaluator.during(at, stage)
        if saving:
            _save(run, batches)
        if stopping:
            run.store.wait()
            raise Stopped(f'stopped at step {at.step} of {plan.steps}, saved; run the same command to go on')
        waiting = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - waiting
        state, metrics = step_fn(at.state, batch, at.stage_step)
        run.at = dataclasses.replace(at, step=at.step + 1, stage_step=at.stage_step + 1, state=state)
        if pending is not None:
            pending()
        pending = StepReport(run, stage, run.at.step, run.at.stage_step, metrics, waited)
    if pending is not None:
        pending()
    run.at = dataclasses.replace(run.at, data=None)


def _save(run: Run, batches: BatchIterator) -> None:
    run.at = dataclasses.replace(run.at, data=batches.get_state())
    run.store.save(run.at)
    run.writer.saved(run.at.step)


Step = Callable[[TrainState, dict[str, np.ndarray], int], tuple[TrainState, dict[str, jax.Array]]]


def _step_function(run: Run, stage: Stage) -> Step:
    """(state, batch, stage step) -> (state, metrics); one compiled program per tuple of budgets, kept."""
    plan, parent = run.plan, run.at.parent
    config, optimizer = plan.step_config(stage), plan.optimizer(stage)
    device_batch = lambda batch: {key: batch[key] for key in ('tokens', 'targets', 'segment_ids', 'positions', 'loss_mask')}
    if stage.kind == 'pretrain':
        pretrain = make_pretrain_step(parent, optimizer, config, stage.config.balance_rate, stage.config.balance_loss)
        return lambda state, batch, n: pretrain(state, device_batch(batch))
    teacher = _teacher(run) if plan.config.teacher == 'frozen' or stage.kind == 'search' else {}
    seed = plan.config.seed
    if stage.kind == 'search':
        search = make_search_step(parent, plan.search_config(stage), optimizer, plan.router_optimizer(), config)

        def search_step(state: TrainState, batch: dict[str, np.ndarray], n: int) -> Any:
            drawn = jnp.asarray(draw_budgets(stage, plan.budgets, n, seed), jnp.int32)
            return search(state, teacher, device_batch(batch), drawn, jax.random.fold_in(jax.random.key(seed + 3), n))

        return search_step
    programs: dict[tuple[int, ...], Any] = {}

    def elastic_step(state: TrainState, batch: dict[str, np.ndarray], n: int) -> Any:
        drawn = draw_budgets(stage, plan.budgets, n, seed)
        if drawn not in programs:
            budgets = [(plan.budgets[i], run.at.archs[plan.budgets[i]]) for i in drawn]
            weights = loss_weights(stage, plan.budgets, drawn)
            programs[drawn] = make_elastic_step(parent, budgets, weights, optimizer, config, plan.config.teacher)
        return programs[drawn](state, teacher, device_batch(batch))

    return elastic_step
