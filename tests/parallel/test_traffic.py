"""Elastic costs no extra traffic: contracts on the compiled programs of eight devices."""

import re

import jax
import pytest

from elastic_jax.hlo_cost import collectives
from elastic_jax.model.collectives import FETCH
from elastic_jax.parallel.placement import Placement
from elastic_jax.train.gradients import loss_and_gradients
from elastic_jax.train.step import StepConfig, elastic_loss
from tests.parallel.meshes import BUDGETS, EVERY, LAYOUT, WEIGHTS, inputs, mesh_of
from tests.tiny import HYBRID


def compiled(mesh, budgets, remat=True) -> str:
    place, config = Placement(mesh, HYBRID, LAYOUT), StepConfig(LAYOUT, chunk=5, remat=remat, mesh=mesh)
    loss_fn = elastic_loss(HYBRID, budgets, WEIGHTS[: len(budgets)], config, 'frozen')
    params, teacher, batch = (place.abstract(tree) for tree in jax.eval_shape(inputs))
    batch = {key: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place.batch_sharding) for key, v in batch.items()}
    return jax.jit(loss_and_gradients(loss_fn, HYBRID, config)).lower(params, teacher, batch).compile().as_text()


def split(text: str) -> tuple[dict, dict]:
    """(what is sent for parameters, what is sent for activations), by kind."""
    sent = re.compile(r' (?:all-gather|reduce-scatter|all-reduce)(?:-start)?\(')
    without = lambda drop: '\n'.join(sent.sub(' copy(', line) if drop(line) else line for line in text.splitlines())
    return collectives(without(lambda line: FETCH not in line)), collectives(without(lambda line: FETCH in line))


@pytest.fixture(scope='module', params=EVERY)
def traffic(request):
    """(all three budgets in lockstep, each budget alone) as (parameters, activations) by kind."""
    mesh = mesh_of(request.param)
    return split(compiled(mesh, BUDGETS)), [split(compiled(mesh, [budget])) for budget in BUDGETS]


def test_parameters_are_fetched_and_reduced_once_for_all_budgets(traffic):
    (lockstep, _), [(full, _), *_] = traffic
    assert lockstep['all-gather'].count > 0 or lockstep['all-reduce'].count > 0
    for kind in ('all-gather', 'reduce-scatter', 'all-reduce'):
        assert lockstep[kind].count <= full[kind].count, kind
        assert lockstep[kind].bytes <= full[kind].bytes, kind


def test_activations_cost_no_more_than_independent_models(traffic):
    (_, lockstep), alone = traffic
    for kind in ('all-gather', 'reduce-scatter', 'all-reduce'):
        assert lockstep[kind].count <= sum(activations[kind].count for _, activations in alone), kind
        assert lockstep[kind].bytes <= sum(activations[kind].bytes for _, activations in alone), kind


def test_slicing_moves_nothing_between_devices(traffic):
    for parameters, activations in (traffic[0], *traffic[1]):
        for kind in ('all-to-all', 'collective-permute'):
            assert parameters[kind].count == activations[kind].count == 0, kind
