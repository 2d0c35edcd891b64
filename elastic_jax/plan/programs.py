"""What of a run is compiled: each stage's step, what it is compared with, and the decoding step of each budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from elastic_jax.arch import Arch, parse_widths
from elastic_jax.cost import flops_per_token, training_flops_per_token
from elastic_jax.errors import UserError
from elastic_jax.model.cache import cached_logits, init_cache
from elastic_jax.model.params import abstract_params
from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.sharding import data_parallelism
from elastic_jax.plan.independent import independent_program
from elastic_jax.train.curriculum import Stage, probabilities_of
from elastic_jax.train.programs import Program, needs_parent, stage_program
from elastic_jax.train.setup import Plan

DECODE_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A program that may be compiled.

    Attributes:
      build: makes it: the Program, and the trees among its arguments by the part of memory that they are.
      flops: of matmuls that the mathematics needs on one device (cost.py).
      activations: bytes of the layers' inputs that one device keeps for the backward pass.
    """

    name: str
    build: Callable[[], tuple[Program, dict[str, Any]]]
    flops: float
    activations: int = 0


def budget_archs(plan: Plan) -> dict[str, Arch]:
    """Budget -> Arch: by `config.widths`, by `config.plan.widths` where a search is still to find it, and the parent for 1.0.

    Raises UserError for a budget whose widths are not known.
    """
    given, archs = dict(plan.config.plan.widths), {}
    for name, share in plan.targets.items():
        if name in plan.by_hand:
            archs[name] = plan.by_hand[name]
        elif name in given:
            archs[name] = plan.parent.narrow(parse_widths(given[name]))
            plan.layout.check(archs[name])
        elif share >= 1.0:
            archs[name] = plan.parent
        else:
            raise UserError(
                f"budget {name} has no widths before the search: give what to plan with, --config.plan.widths='{name}=…' "
                f"in the config file, such as config.plan.widths.{name} = 'embed=96,mlp=256'"
            )
    return archs


def candidates(plan: Plan, place: Placement) -> Iterator[Candidate]:
    """All programs of a run: stages in their order, each elastic one followed by its comparisons; then decoding."""
    archs = budget_archs(plan)
    for stage in plan.stages:
        drawn = dearest_draw(plan, stage)
        own = [plan.parent] * max(1, len(drawn)) if stage.kind != 'elastic' else [archs[plan.budgets[i]] for i in drawn]
        yield _step(stage.name, plan, stage, archs, place, own, drawn)
        if stage.kind == 'elastic':
            for name in (plan.budgets[i] for i in drawn):
                yield _alone(f'{stage.name}/{name}', plan, stage, archs[name], place)
            if plan.grid:
                masked = dataclasses.replace(stage, kind='search')
                yield _step(f'{stage.name}/masks', plan, masked, archs, place, [plan.parent] * len(drawn), drawn)
    for name, arch in archs.items():
        yield _decode(f'decode/{name}', plan, arch, place)


def dearest_draw(plan: Plan, stage: Stage) -> tuple[int, ...]:
    """Indices of the budgets of the stage's dearest step: what is planned for must fit whichever are drawn."""
    if stage.kind == 'pretrain':
        return ()
    possible = tuple(n for n, p in enumerate(probabilities_of(stage, plan.budgets)) if p > 0)
    if stage.config.mode == 'weighted' and stage.kind == 'elastic':
        return possible
    smallest = {len(plan.budgets) - 1} if stage.config.sandwich and stage.kind == 'elastic' else set()
    return tuple(sorted({*possible[: stage.config.per_step], *smallest}))


def _step(
    name: str,
    plan: Plan,
    stage: Stage,
    archs: Mapping[str, Arch],
    place: Placement,
    own: list[Arch],
    drawn: tuple[int, ...],
) -> Candidate:
    def build() -> tuple[Program, dict[str, Any]]:
        program = stage_program(plan, stage, archs, place, drawn)
        return program, _training_parts(program, stage.kind != 'pretrain')

    return _training(name, plan, stage, place, own, build)


def _alone(name: str, plan: Plan, stage: Stage, arch: Arch, place: Placement) -> Candidate:
    def build() -> tuple[Program, dict[str, Any]]:
        program = independent_program(plan, stage, arch, place)
        return program, _training_parts(program, True)

    return _training(name, plan, stage, place, [arch], build)


def _training(name: str, plan: Plan, stage: Stage, place: Placement, own: list[Arch], build: Callable[[], Any]) -> Candidate:
    rows = stage.batch_size / data_parallelism(place.mesh)
    per_token = training_flops_per_token(plan.parent, own, stage.context, needs_parent(plan, stage), plan.config.remat)
    streams = sum(arch.embed * sum(mixer is not None for mixer in arch.mixers) for arch in own)
    kept = rows / stage.config.accumulate * stage.context * streams * jnp.dtype(plan.config.dtype).itemsize
    return Candidate(name, build, float(per_token * rows * stage.context / place.mesh.shape['tensor']), round(kept))


def _training_parts(program: Program, has_teacher: bool) -> dict[str, Any]:
    state, *rest = program.abstract_args
    parts = {'parameters': state.params, 'optimizer': (state.opt_state, state.router, state.router_opt_state)}
    return parts | ({'teacher': rest[0], 'batch': rest[1]} if has_teacher else {'batch': rest[0]})


def _decode(name: str, plan: Plan, arch: Arch, place: Placement) -> Candidate:
    """One token for each of DECODE_ROWS rows with caches of the last stage's context, on one device, in bfloat16."""
    context, dtype = plan.stages[-1].context, jnp.bfloat16

    def build() -> tuple[Program, dict[str, Any]]:
        whole = SingleDeviceSharding(place.mesh.devices.flat[0])
        describe = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)
        params = jax.tree.map(describe, abstract_params(arch, plan.layout, dtype))
        cache = jax.tree.map(describe, jax.eval_shape(lambda: init_cache(arch, DECODE_ROWS, context, dtype)))
        tokens, valid = describe(jnp.zeros((DECODE_ROWS, 1), jnp.int32)), describe(jnp.zeros(DECODE_ROWS, jnp.int32))

        def step(params: Any, tokens: jax.Array, cache: Any, valid: jax.Array) -> tuple[jax.Array, Any]:
            logits_BxTxV, cache = cached_logits(params, tokens, arch, cache, valid, dtype)
            return jnp.argmax(logits_BxTxV[:, -1], axis=-1), cache

        program = Program(jax.jit(step, donate_argnums=2), (params, tokens, cache, valid))
        return program, {'parameters': params, 'cache': cache}

    return Candidate(name, build, float(DECODE_ROWS * flops_per_token(arch, context)))
