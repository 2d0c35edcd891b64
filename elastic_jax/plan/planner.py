"""Planning a run: all its programs compiled for a topology, and what follows from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from elastic_jax.arch import unknown_name
from elastic_jax.errors import UserError, WorkError
from elastic_jax.nest.alignment import Misaligned, misaligned
from elastic_jax.plan.advice import changes
from elastic_jax.plan.chips import Topology, topology_devices
from elastic_jax.plan.compiled import Compiled, compile_program
from elastic_jax.plan.programs import Candidate, budget_archs, candidates
from elastic_jax.train.setup import make_plan


@dataclasses.dataclass(frozen=True)
class Row:
    """One program of a plan: compiled, or the sentence that says why not."""

    name: str
    flops: float
    compiled: Compiled | None
    problem: str = ''


@dataclasses.dataclass(frozen=True)
class Planned:
    """A run on a topology. `changes` says what would make it fit, or send less; `misaligned` is what tiles do not divide."""

    topology: Topology
    mesh: dict[str, int]
    rows: tuple[Row, ...]
    changes: tuple[str, ...]
    misaligned: tuple[Misaligned, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every program of the run could be compiled and fits; of comparisons where nothing else was asked for."""
        own = [row for row in self.rows if not _is_comparison(row.name)]
        return all(row.compiled is not None and row.compiled.fits for row in own or self.rows)

    def to_json(self) -> dict[str, Any]:
        done = [(row.name, row.compiled) for row in self.rows if row.compiled is not None]
        exchanged = lambda one: one.collectives and {kind: value.to_json() for kind, value in one.collectives.items()}
        return {
            'fits': self.fits,
            'topology': self.topology.name,
            'devices': len(self.topology.devices),
            'mesh': self.mesh,
            'hbm_capacity': self.topology.hbm_bytes,
            'hbm_per_chip': {name: {**one.memory, 'total': one.total, 'fits': one.fits} for name, one in done},
            'cycles': {name: one.cycles for name, one in done},
            'relayout_cycles': {name: one.relayout_cycles for name, one in done},
            'flops': {
                row.name: {'needed': row.flops, 'compiled': row.compiled and row.compiled.matmul_flops} for row in self.rows
            },
            'collectives': {name: exchanged(one) for name, one in done},
            'compile_seconds': {name: round(one.compile_seconds, 1) for name, one in done},
            'problems': {row.name: row.problem for row in self.rows if row.problem},
            'changes': list(self.changes),
            'misaligned': [width.to_json() for width in self.misaligned],
        }


def plan_run(
    config: ConfigDict, topology: str, only: Sequence[str] = (), progress: Callable[[str], None] = lambda line: None
) -> Planned:
    """Compiles the programs of a run for a topology, one after the other.

    Args:
      only: names of the programs to compile (all by default).
      progress: is told each program before it is compiled.
    Raises: UserError for a config that does not fit the topology, or an unknown program.
    """
    target = topology_devices(topology)
    plan = make_plan(config, elsewhere=True)
    place = plan.place(target.devices)
    found = {candidate.name: candidate for candidate in candidates(plan, place)}
    for name in only:
        if name not in found:
            raise UserError(unknown_name('program', name, list(found)))
    rows = []
    for name in only or found:
        progress(f'compiling {name} for {topology}')
        rows.append(_compile(found[name], target.hbm_bytes))
    advice = {change: None for row in rows for change in changes(row.name, row.compiled, plan, place)}
    widths = misaligned(budget_archs(plan), plan.layout, plan.stages[-1].context, config.choice_multiple)
    return Planned(target, dict(place.mesh.shape), tuple(rows), tuple(advice), widths)


def _compile(candidate: Candidate, capacity: int) -> Row:
    try:
        program, parts = candidate.build()
        compiled = compile_program(program.fn, program.abstract_args, parts, capacity, candidate.activations)
    except (UserError, WorkError) as error:
        return Row(candidate.name, candidate.flops, None, str(error))
    return Row(candidate.name, candidate.flops, compiled)


def _is_comparison(name: str) -> bool:
    """Whether a program is only there to be compared with: budgets alone and masks."""
    return '/' in name and not name.startswith('decode/')
