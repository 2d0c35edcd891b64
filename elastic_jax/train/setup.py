"""Reading a config into a checked plan of a run, before anything heavy starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from elastic_jax.arch import Arch, parse_widths, unknown_name
from elastic_jax.checkpoint.stored import read_manifest, tokenizer_folder
from elastic_jax.data.config import sources_of, stage_data
from elastic_jax.data.tokenizers import Tokenizer, load_tokenizer
from elastic_jax.errors import UserError
from elastic_jax.layout import Layout
from elastic_jax.model.kernels import KERNELS
from elastic_jax.model.params import param_table
from elastic_jax.nest.budgets import Grid, Metric, make_grid, metric, resolve_targets
from elastic_jax.nest.router import Anneal
from elastic_jax.parallel.mesh import make_mesh
from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.sharding import data_parallelism, mesh_problems
from elastic_jax.train.checks import config_problems
from elastic_jax.train.config import build_arch
from elastic_jax.train.curriculum import Stage, check_draws, check_self_teacher, make_stages
from elastic_jax.train.state import make_optimizer
from elastic_jax.train.step import SearchConfig, StepConfig

TEACHERS = ('frozen', 'cached', 'self', 'none')


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, resolved: what to train, on which budgets, in which stages."""

    config: ConfigDict
    parent: Arch
    layout: Layout
    grid: Grid
    targets: dict[str, float]
    by_hand: dict[str, Arch]
    measure: Metric
    stages: tuple[Stage, ...]
    tokenizer: Tokenizer | None  # None where the run is only planned.

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgets, largest first."""
        return tuple(self.targets)

    @property
    def steps(self) -> int:
        return self.stages[-1].end

    def step_config(self, stage: Stage, mesh: Mesh | None = None) -> StepConfig:
        config = self.config
        return StepConfig(
            layout=self.layout,
            dtype=jnp.dtype(config.dtype),
            remat=config.remat,
            chunk=config.loss_chunk,
            accumulate=stage.config.accumulate,
            scan=config.scan_layers,
            kernels=config.kernels,
            mesh=mesh,
        )

    def place(self, devices: Sequence[Any] | None = None) -> Placement:
        """Where the run's arrays live, over `devices` (default: all). Raises one UserError that lists all that does not fit."""
        mesh = make_mesh(self.config.mesh.to_dict(), devices)
        problems, parts = mesh_problems(self.parent, self.layout, mesh), data_parallelism(mesh)
        for stage in self.stages:
            if stage.batch_size % (parts * stage.config.accumulate):
                pieces = f' in {stage.config.accumulate} micro-batches' if stage.config.accumulate > 1 else ''
                unit = parts * stage.config.accumulate
                problems.append(
                    f'stages.{stage.name}.batch_size={stage.batch_size} does not split over {parts} devices{pieces}; '
                    f'take a multiple of {unit}, such as {-(-stage.batch_size // unit) * unit}, or a smaller config.mesh'
                )
        if problems:
            raise UserError('; '.join(problems))
        return Placement(mesh, self.parent, self.layout)

    def search_config(self, stage: Stage) -> SearchConfig:
        router = self.config.router
        anneal = Anneal(router.start_temperature, router.end_temperature, router.start_scale, router.end_scale)
        targets = tuple(self.targets.items())
        return SearchConfig(self.grid, targets, self.measure, anneal, stage.steps, router.weight, router.dead_zone, router.anchor)

    def data(self, stage: Stage) -> ConfigDict:
        """`config.data` as the stage has it."""
        return stage_data(self.config.data, stage.config.data)

    def optimizer(self, stage: Stage) -> optax.GradientTransformation:
        return stage_optimizer(self.config, stage, self.parent, self.layout)

    def router_optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.config.router.lr)


def stage_optimizer(config: ConfigDict, stage: Stage, parent: Arch, layout: Layout) -> optax.GradientTransformation:
    """The optimiser of a stage: `config.optimizer` with the keys that the stage has otherwise."""
    merged = ConfigDict(config.optimizer.to_dict() | dict(stage.config.optimizer))
    return make_optimizer(merged, stage.steps, param_table(parent, layout))


def make_plan(config: ConfigDict, elsewhere: bool = False) -> Plan:
    """Checks a config and resolves it; raises one UserError that lists every problem found.

    Problems of keys and numbers come first: nothing can be reckoned with them.

    `elsewhere`: the run is not for this machine, which need have neither the tokenizer nor, where `config.arch` is given, the
    parent's checkpoint.
    """
    problems: list[str] = []

    def attempt(build: Any, *args: Any) -> Any:
        try:
            return build(*args)
        except UserError as error:
            if str(error) not in problems:  # stages share most of what may be wrong
                problems.append(str(error))
            return None

    problems += config_problems(config)
    stages = attempt(make_stages, config)
    if problems:
        raise UserError('; '.join(problems))
    layout = Layout(**config.layout.to_dict())
    parent = attempt(build_arch if elsewhere and config.arch.pattern else _parent, config)
    tokenizer = None if elsewhere else attempt(_tokenizer, config)
    if config.teacher not in TEACHERS:
        problems.append(unknown_name('teacher', config.teacher, list(TEACHERS)))
    if config.kernels not in KERNELS:
        problems.append(unknown_name('kernels', config.kernels, list(KERNELS)))
    if config.teacher == 'cached':
        problems += _cache_problems(config, parent)
    if config.calibrate.order not in ('importance', 'random'):
        problems.append(unknown_name('calibrate.order', config.calibrate.order, ['importance', 'random']))
    grid, targets, by_hand, measure = (), {}, {}, None
    if parent is not None:
        attempt(layout.check, parent)
        measure = attempt(metric, config.metric, config.metric_context)
        grid = attempt(make_grid, parent, dict(config.choices), config.per_layer, layout, config.choice_multiple) or ()
        by_hand = attempt(hand_archs, config, parent, layout) or {}
        if measure and not problems:
            searched = {name: share for name, share in config.budgets.items() if name not in by_hand}
            resolved = attempt(resolve_targets, searched, parent, grid, measure, config.tolerance) or {}
            whole = float(measure(parent, None))
            shares = resolved | {name: float(measure(arch, None)) / whole for name, arch in by_hand.items()}
            targets = dict(sorted(shares.items(), key=lambda item: -item[1]))
        if tokenizer is not None and tokenizer.vocab_size > parent.vocab:
            problems.append(
                f"the tokenizer has {tokenizer.vocab_size} entries, but the parent's vocabulary is {parent.vocab}; "
                "use the parent's own tokenizer (config.data.tokenizer) or a larger config.arch.vocab"
            )
    for stage in stages:
        if parent is not None:
            attempt(stage_optimizer, config, stage, parent, layout)  # now, not when the stage begins after days of others
        attempt(lambda stage=stage: sources_of(stage_data(config.data, stage.config.data)))
        if stage.kind != 'pretrain' and targets:
            attempt(check_draws, stage, tuple(targets))
            if stage.kind == 'elastic' and config.teacher == 'self':
                attempt(check_self_teacher, stage, targets)
    if targets:
        searching = any(stage.kind == 'search' for stage in stages)
        missing = [name for name, share in targets.items() if share < 1 and name not in by_hand]
        if missing and not searching:
            problems.append(f'budgets {", ".join(missing)} have no widths: add a search stage, or give them in config.widths')
        if config.parent.scratch and config.parent.scratch not in by_hand:
            problems.append(
                unknown_name('budget in parent.scratch (it needs widths by hand)', config.parent.scratch, list(by_hand))
            )
        if searching and by_hand:
            problems.append('config.widths gives widths by hand and the curriculum has a search stage: take one of them out')
    if problems:
        raise UserError('; '.join(problems))
    return Plan(config, parent, layout, grid, targets, by_hand, measure, stages, tokenizer)


def _cache_problems(config: ConfigDict, parent: Arch | None) -> list[str]:
    own, problems = config.teacher_cache, []
    if not config.parent.checkpoint:
        problems.append(
            "config.teacher='cached' needs config.parent.checkpoint: train the parent alone first, then cache its logits"
        )
    if not own.path:
        problems.append('config.teacher_cache.path is empty; give the folder that elastic cache-teacher writes to')
    if parent is not None and not 1 <= own.k <= parent.vocab:
        problems.append(f"config.teacher_cache.k={own.k} is not between 1 and the parent's vocabulary of {parent.vocab}")
    return problems


def _tokenizer(config: ConfigDict) -> Tokenizer:
    """That of `config.data`; bytes mean nothing to a parent that has a tokenizer of its own."""
    checkpoint = config.parent.checkpoint
    if checkpoint and config.data.tokenizer == 'bytes':
        folder = tokenizer_folder(checkpoint, read_manifest(checkpoint))
        if folder is not None:
            raise UserError(
                f"config.data.tokenizer='bytes', but the parent {checkpoint} has its own; set config.data.tokenizer={folder}"
            )
    return load_tokenizer(config.data.tokenizer)


def _parent(config: ConfigDict) -> Arch:
    if config.parent.checkpoint:
        manifest = read_manifest(config.parent.checkpoint)
        if config.parent.budget not in manifest.budgets:
            raise UserError(unknown_name('budget in config.parent', config.parent.budget, list(manifest.budgets)))
        return manifest.budgets[config.parent.budget].arch
    return build_arch(config)


def known_archs(plan: Plan, parent: Arch) -> dict[str, Arch]:
    """Budget -> Arch, largest first, of those that need no search: the whole parent, and widths by hand.

    Where no budget is the whole parent, it is there beside them as `full`.
    """
    by_hand = hand_archs(plan.config, parent, plan.layout)
    archs = {name: by_hand.get(name, parent) for name, share in plan.targets.items() if name in by_hand or share >= 1.0}
    return archs if parent in archs.values() else {'full': parent} | archs


def hand_archs(config: ConfigDict, parent: Arch, layout: Layout) -> dict[str, Arch]:
    """The submodels whose widths `config.widths` gives; `layers` keeps the first of the parent's ranking."""
    archs = {}
    for name, text in dict(config.widths).items():
        if name not in config.budgets:
            raise UserError(unknown_name('budget in config.widths', name, list(config.budgets)))
        archs[name] = parent.narrow(parse_widths(text))
        layout.check(archs[name])
    return archs
