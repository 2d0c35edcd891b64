"""Before the first step of a run: everything that may be wrong on one host alone is looked at on all of them, and said by all.

Nothing here leaves one process waiting for another that has already failed.
"""

from __future__ import annotations

import jax
from etils import epath
from ml_collections import ConfigDict

from elastic_jax.data.pipeline import fingerprints, read_all
from elastic_jax.evaluate.evaluators import check_evaluators
from elastic_jax.nest.alignment import misaligned
from elastic_jax.observe.sinks import check_observing
from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.processes import check_same, is_main, together
from elastic_jax.train.setup import Plan, make_plan
from elastic_jax.train.workdir import check_shared, check_workdir, claim_workdir


def prepare(config: ConfigDict, workdir: epath.Path) -> tuple[Plan, Placement, list[str]]:
    """(the plan, where its arrays live, sentences worth saying first); the workdir is this experiment's afterwards.

    The sentences are on data that was passed over, and on widths given by hand that the accelerator's tiles do not divide.

    Raises: UserError for what is wrong on any process, before anything is written; then, when the workdir cannot be written.
    """

    def check() -> tuple[Plan, Placement, list[str], list[str]]:
        plan = make_plan(config)
        check_observing(config)
        data = [config.data, *(plan.data(stage) for stage in plan.stages)]
        passed_over, place = read_all(data), plan.place()
        check_evaluators(config.evaluators, config.data)
        check_workdir(workdir, config)
        return plan, place, passed_over, fingerprints(data)

    plan, place, passed_over, data = together(check)
    facts = {'--workdir': str(workdir), 'config': config.to_json(), 'training data': ' '.join(data), 'JAX': jax.__version__}
    check_same(facts, 'start all of them with the same arguments, config file, data and installation')
    together(lambda: claim_workdir(workdir, config) if is_main() else None)
    together(lambda: check_shared(workdir, config))
    return plan, place, passed_over + on_tiles(plan, place.mesh.devices.flat[0].platform)


def on_tiles(plan: Plan, platform: str) -> list[str]:
    """A sentence for each width given by hand that is no whole tiles; none on CPUs, which have none."""
    if platform == 'cpu':
        return []
    widths = misaligned(plan.by_hand, plan.layout, plan.stages[-1].context, plan.config.choice_multiple)
    return [str(one) for one in widths]
