"""What a plan says: the contract's JSON keys, the table, and what to change; from figures given by hand."""

import dataclasses

import jax
import pytest

from elastic_jax.errors import UserError
from elastic_jax.hlo_cost import KINDS, Collective
from elastic_jax.nest.alignment import Misaligned
from elastic_jax.plan.advice import changes
from elastic_jax.plan.chips import GIB, Topology, topology_devices
from elastic_jax.plan.compiled import Compiled, bytes_wanted
from elastic_jax.plan.planner import Planned, Row
from elastic_jax.plan.programs import budget_archs, candidates, dearest_draw
from elastic_jax.plan.table import show
from elastic_jax.train.setup import make_plan
from tests.train.tiny_experiment import get_config

MEMORY = {'parameters': 4 * GIB, 'optimizer': 8 * GIB, 'teacher': 2 * GIB, 'activations': GIB, 'temporary': 3 * GIB, 'other': 0}
COLLECTIVES = {kind: Collective() for kind in KINDS} | {'all-gather': Collective(3, 2_000_000_000, {4: (3, 2_000_000_000)})}
STEP = Compiled(MEMORY, 18 * GIB, True, 5_000_000, 250_000, 2e12, COLLECTIVES, 61.0)


def planned(*rows, changes=()):
    return Planned(Topology('v5p:2x2x1', (None,) * 4), {'replica': 1, 'fsdp': 4, 'expert': 1, 'tensor': 1}, rows, tuple(changes))


def test_json_has_the_keys_of_the_contract():
    found = planned(Row('short', 1e12, STEP), Row('short/mid', 1e11, None, 'no such run')).to_json()
    assert found['fits'] is True
    assert found['hbm_per_chip']['short'] == {**MEMORY, 'total': 18 * GIB, 'fits': True}
    assert found['cycles'] == {'short': 5_000_000} and found['relayout_cycles'] == {'short': 250_000}
    assert found['collectives']['short']['all-gather'] == {
        'count': 3,
        'bytes': 2_000_000_000,
        'by_group_size': {'4': {'count': 3, 'bytes': 2_000_000_000}},
    }
    assert found['flops']['short'] == {'needed': 1e12, 'compiled': 2e12}
    assert found['problems'] == {'short/mid': 'no such run'}
    assert (found['devices'], found['hbm_capacity']) == (4, 95 * GIB)


def test_the_table_shows_memory_work_and_collectives():
    lines = show(planned(Row('short', 1e12, STEP))).splitlines()
    rows = [line.split() for line in lines if line.startswith('short')]
    assert rows[0] == ['short', '4.00', '8.00', '2.00', '1.00', '3.00', '0.00', '18.00', 'yes']
    assert rows[1] == ['short', '1', '2', '5', '0.25', '61']
    assert rows[2] == ['short', '3,', '2', '-', '-', '-', '-']
    assert lines[-1] == 'fits'


def test_misaligned_widths_are_in_the_table_and_in_the_json():
    one = Misaligned('small', 'embed', 2240, 128, 2304, 0.0261)
    found = dataclasses.replace(planned(Row('short', 1e12, STEP)), misaligned=(one,))
    assert ['small', 'embed', '2240', '2304', '+2.6%'] in [line.split() for line in show(found).splitlines()]
    assert found.to_json()['misaligned'][0]['extra_flops'] == 0.0261


def test_only_what_the_run_itself_needs_decides_whether_it_fits():
    full = dataclasses.replace(STEP, fits=False, cycles=None, relayout_cycles=None, matmul_flops=None, collectives=None)
    assert planned(Row('short', 1.0, STEP), Row('short/masks', 1.0, full)).fits
    assert not planned(Row('short', 1.0, full)).fits
    assert not planned(Row('short/masks', 1.0, full)).fits  # nothing else was asked for
    assert not planned(Row('short/masks', 1.0, None, 'no such run')).fits
    shown = show(planned(Row('short', 1.0, full), changes=['short: take config.remat=True']))
    assert shown.splitlines()[-2:] == ['does not fit', '  short: take config.remat=True']
    assert 'NO' in shown


def plan_here(devices=1):
    config = get_config()
    config.mesh.fsdp = devices
    if devices > 1:
        config.stages.short.batch_size, config.stages.long.batch_size = 8, 4
    config.plan.widths.update({'mid': 'embed=12,mlp=16', 'small': 'embed=8,mlp=16'})
    plan = make_plan(config, elsewhere=True)
    return plan, plan.place(jax.devices()[:devices])


@pytest.mark.parametrize('largest', ['parameters', 'temporary'])
def test_what_to_change_begins_with_the_largest_part(largest):
    plan, place = plan_here()
    sizes = {'parameters': GIB, 'temporary': GIB} | {largest: 50 * GIB}
    full = Compiled(sizes, sum(sizes.values()), False, None, None, None, None, 1.0)
    found = changes('short', full, plan, place)
    assert ('topology with more chips' in found[0]) == (largest == 'parameters')
    assert any('config.remat=True' in change for change in found)
    assert any('config.stages.short.' in change for change in found)
    assert changes('short', dataclasses.replace(full, fits=True), plan, place) == []


def test_parameters_that_are_fetched_by_all_reduce_are_noticed():
    plan, place = plan_here(devices=4)
    reduced = STEP.collectives | {'all-gather': Collective(), 'all-reduce': Collective(3, 4, {4: (3, 4)})}
    assert changes('short', STEP, plan, place) == []
    (change,) = changes('short', dataclasses.replace(STEP, collectives=reduced), plan, place)
    assert 'over 4 chips by all-reduce' in change and 'config.mesh.fsdp=2' in change


def test_a_step_that_draws_budgets_is_planned_with_the_largest():
    plan, _ = plan_here()
    stage = next(stage for stage in plan.stages if stage.name == 'long')
    assert dearest_draw(plan, stage) == (0, 1, 2)
    stage.config.update({'mode': 'sampled', 'per_step': 1})
    assert dearest_draw(plan, stage) == (0,)
    stage.config.sandwich = True
    assert dearest_draw(plan, stage) == (0, 2)


@pytest.mark.parametrize(
    ('message', 'wanted'),
    [
        ('RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm. Exceeded', int(120.5 * GIB)),
        ('the total memory required for HLO temporaries (141.50G) exceeds available HBM (95.73G). HLO', int(144.5 * GIB)),
        ('INTERNAL: something else', None),
    ],
)
def test_a_compiler_without_memory_says_how_much_it_wanted(message, wanted):
    assert bytes_wanted(message, arguments=3 * GIB) == wanted


def test_one_long_sequence_on_a_chip_is_helped_by_fewer_budgets_a_step():
    plan, place = plan_here()
    full = Compiled({'activations': 90 * GIB, 'temporary': GIB}, 91 * GIB, False, None, None, None, None, 1.0)
    stages = tuple(dataclasses.replace(stage, batch_size=1) if stage.name == 'long' else stage for stage in plan.stages)
    plan = dataclasses.replace(plan, stages=stages)
    assert any("config.stages.long.mode='sampled'" in change for change in changes('long', full, plan, place))
    assert not any('sampled' in change for change in changes('long/full', full, plan, place))


def test_all_programs_of_a_run_are_named():
    plan, place = plan_here()
    alone = ['full', 'mid', 'small']
    compared = lambda stage: [stage, *(f'{stage}/{name}' for name in alone), f'{stage}/masks']
    expected = ['pretrain', 'search', *compared('short'), *compared('long'), *(f'decode/{name}' for name in alone)]
    assert [candidate.name for candidate in candidates(plan, place)] == expected


def test_flops_of_the_steps_are_ordered_as_their_work():
    plan, place = plan_here()
    flops = {candidate.name: candidate.flops for candidate in candidates(plan, place)}
    assert flops['short/small'] < flops['short/mid'] < flops['short/full'] < flops['short'] < flops['short/masks']
    alone = sum(flops[f'short/{name}'] for name in ('full', 'mid', 'small'))
    teacher = flops['short/full'] / 4  # one forward pass of four: the other three are the student's
    assert flops['short'] == pytest.approx(alone - 2 * teacher)


@pytest.mark.parametrize('teacher', ['self', 'none'])
def test_flops_count_the_frozen_parent_where_the_step_runs_it(teacher):
    """A search distils from it whatever teaches afterwards; other stages then do without."""
    needed = {}
    for name in ('frozen', teacher):
        plan, place = plan_here()
        plan.config.teacher = name
        needed[name] = {candidate.name: candidate.flops for candidate in candidates(plan, place)}
    assert needed[teacher]['search'] == needed['frozen']['search']
    assert needed[teacher]['short'] == pytest.approx(needed['frozen']['short'] - needed['frozen']['short/full'] / 4)


def test_a_budget_without_widths_is_named():
    plan = make_plan(get_config(), elsewhere=True)
    with pytest.raises(UserError, match=r'budget mid has no widths before the search.*config.plan.widths'):
        budget_archs(plan)


@pytest.mark.parametrize('name', ['v5p', 'v9:2x2', 'v5p:8x', '8x8', 'v5p:8x8x4x2'])
def test_an_unknown_topology_is_answered_with_known_ones(name):
    with pytest.raises(UserError, match=r'unknown topology.*v5p:8x8x4'):
        topology_devices(name)


def test_without_the_compiler_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'elastic_jax\[plan\]'"):
        topology_devices('v5p:8x8x4')
