"""The main job: from a config and a workdir to one elastic checkpoint.

Order of initialisation: resume from the workdir's newest good checkpoint; else start from `config.parent.checkpoint`; else from
scratch. Order inside the loop: evaluate, save (state and data position together), next batch, step, write the metrics of the
step before. A checkpoint of step N holds all that step N needs, so a killed run resumes bit for bit. At the end: save, evaluate,
and put the scores into what was saved, so that no failure of the last evaluation costs any training.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from elastic_jax.arch import Arch
from elastic_jax.data.pipeline import BatchIterator, make_iterator
from elastic_jax.metrics import MetricsWriter
from elastic_jax.model.params import init_params
from elastic_jax.nest.freeze import freeze
from elastic_jax.nest.ordering import Ordering
from elastic_jax.nest.router import init_router
from elastic_jax.nest.slice import insert_params
from elastic_jax.observe.clock import Clock
from elastic_jax.observe.profile import ProfileWindow
from elastic_jax.observe.sinks import open_sinks
from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.processes import are_several, is_main
from elastic_jax.train import persist
from elastic_jax.train.calibrate import order_parent
from elastic_jax.train.curriculum import DONE, Stage, draw_budgets
from elastic_jax.train.finish import Evaluator, finish
from elastic_jax.train.flops import stage_flops
from elastic_jax.train.persist import Snapshot, initial_params
from elastic_jax.train.prepare import prepare
from elastic_jax.train.programs import batch_keys, needs_parent, stage_program
from elastic_jax.train.progress import RunProgress
from elastic_jax.train.reporting import StepReport
from elastic_jax.train.setup import Plan, known_archs
from elastic_jax.train.signals import StopOnSignal, Stopped
from elastic_jax.train.state import TrainState, new_state
from elastic_jax.train.teacher_cache import open_cache, parameters_hash


@dataclasses.dataclass
class Run:
    """The handles of a run in progress and where it stands."""

    plan: Plan
    place: Placement
    workdir: epath.Path
    store: persist.Store
    writer: MetricsWriter
    progress: RunProgress
    evaluator: Evaluator
    clock: Clock
    profile: ProfileWindow
    at: Snapshot
    restored: int | None = None
    teacher: Any = None
    stop: StopOnSignal = dataclasses.field(default_factory=StopOnSignal)


def train(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Runs or resumes the experiment in `workdir` until its curriculum is done and its report written.

    Raises: UserError for a bad config or another experiment's workdir, WorkError when the training itself fails, Stopped
    after SIGTERM, when everything is saved.
    """
    with closing(Clock()) as clock:
        _train(config, epath.Path(workdir), clock)


def _train(config: ConfigDict, workdir: epath.Path, clock: Clock) -> None:
    if config.compilation_cache:
        jax.config.update('jax_compilation_cache_dir', config.compilation_cache)
    plan, place, first = prepare(config, workdir)
    store, waits = persist.Store(workdir, plan, place), True
    try:
        with RunProgress({stage.name: stage_flops(plan, stage) for stage in plan.stages}, is_main()) as progress:
            for sentence in first:
                progress.say(sentence)
            restored = store.restore_newest(progress.say)
            latest = None if restored is None else restored.step
            at = restored or _begin(plan, store, progress.say)
            sinks = open_sinks(config, workdir, latest) if is_main() else ()
            profile = ProfileWindow(config.profile.start, config.profile.steps if is_main() else 0, workdir / 'profile')
            ended = restored is not None and restored.stage_step == plan.stages[-1].steps and restored.step == plan.steps
            with closing(MetricsWriter(workdir, latest, is_main(), sinks, ended)) as writer, closing(profile):
                if restored is None:
                    writer.write('stage', 0, stage=plan.stages[0].name, event='start')
                evaluator = Evaluator(plan, place, writer)
                run = Run(plan, place, workdir, store, writer, progress, evaluator, clock, profile, at, latest)
                if restored:
                    progress.say(f'resuming {workdir} at step {latest} of {plan.steps}')
                with run.stop:
                    _run_stages(run)
                store.wait()
            if is_main():
                finish(workdir, progress.say)
    except Stopped:
        raise
    except BaseException:
        waits = not are_several()  # a save that one has failed in, the others cannot finish either
        raise
    finally:
        if waits:
            store.close()


def _begin(plan: Plan, store: persist.Store, say: Callable[[str], None]) -> Snapshot:
    """The start of a new run: random parameters for the pretrain stage, or an existing parent, ordered."""
    first = plan.stages[0]
    params = initial_params(plan, store.place)
    if plan.config.teacher == 'cached':
        store.parent_hash = parameters_hash(params)
        for stage in plan.stages:
            open_cache(plan, stage, store.parent_hash)  # what is missing is said before anything is computed
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    mesh = ' × '.join(f'{name}={size}' for name, size in store.place.mesh.shape.items() if size > 1) or '1'
    say(f'parent {plan.parent.pattern}: {parameters:,} parameters on {mesh} {jax.default_backend()} device(s)')
    if first.kind == 'pretrain':
        state = store.place.make(lambda p: new_state(p, plan.optimizer(first)), params)
        return Snapshot(0, first.name, 0, state, {}, {}, plan.parent, {'full': plan.parent}, None)
    at = _order(plan, store, params, 0, first, say)
    store.save(at)
    return at


def _order(plan: Plan, store: persist.Store, params: Any, step: int, stage: Stage, say: Callable[[str], None]) -> Snapshot:
    """Orders the parent, pins it as the teacher, and stands before the first elastic stage."""
    params, ordering, parent = order_parent(params, plan, store.place, say)
    archs = known_archs(plan, parent)
    store.save_parent(params, parent, ordering)
    if plan.config.parent.scratch:
        child = archs[plan.config.parent.scratch]
        fresh = lambda key: init_params(key, child, plan.layout)
        anew = lambda p, key: insert_params(p, fresh(key), parent, child, plan.layout)
        params = store.place.make(anew, params, jax.random.key(plan.config.seed + 4))
    return _enter(plan, store.place, stage, step, params, {}, ordering, parent, archs)


def _enter(
    plan: Plan,
    place: Placement,
    stage: Stage,
    step: int,
    params: Any,
    router: Any,
    ordering: Ordering,
    parent: Arch,
    archs: dict[str, Arch],
) -> Snapshot:
    """The snapshot at the start of a stage after pretraining."""
    if stage.kind == 'search':
        router = place.make(lambda key: init_router(key, plan.grid, len(plan.budgets)), jax.random.key(plan.config.seed + 2))
        start = lambda p, r: new_state(p, plan.optimizer(stage), r, plan.router_optimizer())
        state = place.make(start, params, router)
    else:
        state = place.make(lambda p: new_state(p, plan.optimizer(stage)), params)
    return Snapshot(step, stage.name, 0, state, router, ordering, parent, archs, None)


def _teacher(run: Run) -> Any:
    if run.teacher is None:
        run.teacher = run.store.restore_parent()
    return run.teacher


def _run_stages(run: Run) -> None:
    names = [stage.name for stage in run.plan.stages]
    if run.at.stage == DONE:
        return
    for index in range(names.index(run.at.stage), len(names)):
        stage = run.plan.stages[index]
        if run.at.stage_step < stage.steps:  # else all that it lacks is the last evaluation
            _run_stage(run, stage)
            if stage.kind == 'search':
                run.at = dataclasses.replace(run.at, archs=_freeze(run), router=run.at.state.router)
            run.writer.write('stage', run.at.step, stage=stage.name, event='end')
        if index + 1 == len(names):
            _end(run, stage)
        else:
            following = run.plan.stages[index + 1]
            run.at = _leave(run, stage, following)
            # With the checkpoint still to come: a resumed run finds the line there, or writes it again.
            run.writer.write('stage', run.at.step, stage=following.name, event='start')
            with run.clock.part('save'):
                run.store.save(run.at)
        run.writer.write('goodput', run.at.step, **run.clock.goodput())
        run.writer.saved(run.at.step)


def _end(run: Run, stage: Stage) -> None:
    """The last evaluation, of what is saved before it: at the end of the last stage until the scores are there, then done."""
    with run.clock.part('save'):
        run.store.save(run.at)
    run.writer.saved(run.at.step)
    with run.clock.part('eval'):
        # A parent trained alone has no teacher: it is compared with itself.
        metrics = run.evaluator.final(run.at, run.at.state.params if stage.kind == 'pretrain' else _teacher(run))
    run.at = dataclasses.replace(run.at, stage=DONE, stage_step=0, metrics=metrics)
    with run.clock.part('save'):
        run.store.describe_anew(run.at)


def _freeze(run: Run) -> dict[str, Arch]:
    """The submodels that a finished search has found."""
    plan, at = run.plan, run.at
    frozen = freeze(at.state.router, plan.grid, at.parent, plan.targets, plan.measure, plan.config.tolerance)
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
    with run.clock.part('eval'):
        run.evaluator.hardening(at, archs, at.state.router)
    return archs


def _leave(run: Run, stage: Stage, following: Stage) -> Snapshot:
    """What a finished stage hands to the next one."""
    plan, at = run.plan, run.at
    if stage.kind == 'pretrain':
        next_at = _order(plan, run.store, at.state.params, at.step, following, run.progress.say)
        if plan.config.parent.scratch:  # not the weights that were scored
            return next_at
    else:
        next_at = _enter(plan, run.place, following, at.step, at.state.params, at.router, at.ordering, at.parent, at.archs)
    return dataclasses.replace(next_at, metrics={name: own for name, own in at.metrics.items() if name in next_at.archs})


def _run_stage(run: Run, stage: Stage) -> None:
    plan, config = run.plan, run.plan.config
    batches = make_iterator(
        plan.data(stage),
        split='train',
        batch_size=stage.batch_size,
        context=stage.context,
        seed=config.seed + stage.start,
        rows=run.place.rows(stage.batch_size),
        beside=open_cache(plan, stage, run.store.parent_hash).rows if config.teacher == 'cached' else None,
        end=stage.steps,
    )
    if run.at.data is not None:
        batches.set_state(run.at.data)
    # Placed from the first step on: otherwise the second call, on the first one's outputs, would compile once more.
    run.at = dataclasses.replace(run.at, state=run.place.put(run.at.state))
    step_fn = _step_function(run, stage)
    pending: Callable[[], None] | None = None
    run.clock.ready()
    while run.at.stage_step < stage.steps:
        at = run.at
        fresh = at.stage_step > 0 and at.step != run.restored
        evaluating = fresh and config.eval.every and at.step % config.eval.every == 0
        run.store.check()
        stopping = run.stop.at(at.step)
        saving = stopping or (fresh and at.step % config.checkpoint.every == 0)
        if pending is not None and (saving or evaluating):
            # A checkpoint of step N comes after the line of step N, which a resumed run would not write again.
            pending()
            pending = None
        if evaluating:
            with run.clock.part('eval'):
                at = run.at = dataclasses.replace(at, metrics=run.evaluator.during(at, stage))
        if saving:
            _save(run, batches)
        if stopping:
            run.store.wait()
            raise Stopped(f'stopped at step {at.step} of {plan.steps}, saved; run the same command to go on')
        waiting = time.perf_counter()
        with run.clock.part('data'):
            batch = next(batches)
        waited = time.perf_counter() - waiting
        begun = time.perf_counter() - run.clock.seconds['compile']
        with run.clock.part('step'), run.profile.step(at.step):
            state, metrics = step_fn(at.state, batch, at.stage_step)
        run.at = dataclasses.replace(at, step=at.step + 1, stage_step=at.stage_step + 1, state=state)
        begun += run.clock.seconds['compile']  # compiling is not part of the step
        if pending is not None:
            pending()
            begun = time.perf_counter()
        pending = StepReport(run, stage, run.at.step, run.at.stage_step, metrics, waited, begun)
    if pending is not None:
        pending()
    run.at = dataclasses.replace(run.at, data=None)
    if config.eval.every and run.at.step % config.eval.every == 0 and run.at.step < plan.steps:  # the run's end has its own
        with run.clock.part('eval'):
            run.at = dataclasses.replace(run.at, metrics=run.evaluator.during(run.at, stage))


def _save(run: Run, batches: BatchIterator) -> None:
    run.at = dataclasses.replace(run.at, data=batches.get_state())
    with run.clock.part('save'):
        run.store.save(run.at)
    run.writer.saved(run.at.step)


Step = Callable[[TrainState, dict[str, np.ndarray], int], tuple[TrainState, dict[str, jax.Array]]]


def _step_function(run: Run, stage: Stage) -> Step:
    """(state, batch, stage step) -> (state, metrics); one compiled program per tuple of budgets, kept."""
    plan, seed = run.plan, run.plan.config.seed
    place = dataclasses.replace(run.place, parent=run.at.parent)
    program = partial(stage_program, plan, stage, run.at.archs, place)
    keys = batch_keys(plan, stage)
    put = lambda batch: place.put_batch({key: batch[key] for key in keys}, stage.batch_size)
    if stage.kind == 'pretrain':
        pretrain = program().fn
        return lambda state, batch, n: pretrain(state, put(batch))
    teacher = _teacher(run) if needs_parent(plan, stage) else {}
    if stage.kind == 'search':
        search = program().fn

        def search_step(state: TrainState, batch: dict[str, np.ndarray], n: int) -> Any:
            drawn = np.asarray(draw_budgets(stage, plan.budgets, n, seed), np.int32)
            noise = np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(seed + 3), n)))
            return search(state, teacher, put(batch), drawn, noise)

        return search_step
    programs: dict[tuple[int, ...], Any] = {}

    def elastic_step(state: TrainState, batch: dict[str, np.ndarray], n: int) -> Any:
        drawn = draw_budgets(stage, plan.budgets, n, seed)
        if drawn not in programs:
            programs[drawn] = program(drawn).fn
        return programs[drawn](state, teacher, put(batch))

    return elastic_step
