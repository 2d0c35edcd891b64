"""Elastic costs no extra traffic: contracts on the compiled programs of eight devices."""

import re

import jax
import pytest

from elastic_jax.hlo_cost import collectives
from elastic_jax.model.fetch import FETCH
from elastic_jax.model.params import abstract_params
from elastic_jax.parallel.placement import Placement
from elastic_jax.train.gradients import loss_and_gradients
from elastic_jax.train.step import StepConfig, elastic_loss
from tests.parallel.meshes import BUDGETS, EVERY, LAYOUT, MESHES, WEIGHTS, inputs, mesh_of
from tests.tiny import HYBRID


def compiled(mesh, budgets, parent=HYBRID, teacher='frozen') -> str:
    """The program of a loss and its gradients in `parent`; the frozen teacher, where there is one, is of the same shape."""
    place, config = Placement(mesh, parent, LAYOUT), StepConfig(LAYOUT, chunk=5, remat=True, mesh=mesh)
    loss_fn = elastic_loss(parent, budgets, WEIGHTS[: len(budgets)], config, teacher)
    params, batch = place.abstract(abstract_params(parent, LAYOUT)), jax.eval_shape(inputs)[-1]
    batch = {key: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place.batch_sharding) for key, v in batch.items()}
    return jax.jit(loss_and_gradients(loss_fn, parent, config)).lower(params, params, batch).compile().as_text()


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


def test_parameters_are_fetched_and_reduced_once_for_all_budgets(traffic, request):
    (lockstep, _), [(full, _), *_] = traffic
    if MESHES[request.node.callspec.params['traffic']].get('fsdp', 1) > 1:  # else every device has what it computes with
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


# Nested in each other, without the full budget; the embedding axis alone is gathered whole.
WITHOUT_FULL = (
    ('mid', HYBRID.narrow(mlp=32, experts=4, query_heads=1, shared_width=16, expert_width=8, mamba_heads=4, mamba_head_dim=2)),
    ('small', HYBRID.narrow(mlp=16, experts=4, query_heads=1, shared_width=8, expert_width=4, mamba_heads=2, mamba_head_dim=2)),
)


def test_a_step_without_the_full_budget_fetches_no_more_than_a_model_of_its_largest_size():
    mesh, (_, mid) = mesh_of('all'), WITHOUT_FULL[0]
    (lockstep, _), (alone, _) = (
        split(compiled(mesh, budgets, parent, 'none')) for budgets, parent in ((WITHOUT_FULL, HYBRID), ([('mid', mid)], mid))
    )
    for kind in ('all-gather', 'reduce-scatter', 'all-reduce'):
        assert lockstep[kind].count <= alone[kind].count, kind
        assert lockstep[kind].bytes <= alone[kind].bytes, kind


ONE_AXIS = [
    {'embed': 16}, {'query_heads': 1}, {'kv_heads': 2}, {'mamba_heads': 4}, {'mamba_head_dim': 2}, {'mlp': 16}, {'experts': 4},
    {'expert_width': 8}, {'shared_width': 8}, {'layers': 3},
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('widths', ONE_AXIS, ids=lambda widths: next(iter(widths)))
def test_every_axis_alone_is_sliced_in_place(widths):
    budget = [('one', HYBRID.narrow(widths))]
    for name in MESHES:
        text = compiled(mesh_of(name), budget, teacher='none')
        parameters, activations = split(text)
        for kind in ('all-to-all', 'collective-permute'):
            assert parameters[kind].count == activations[kind].count == 0, (name, kind)
