"""The planner with the real TPU compiler: the command, on published widths."""

import json
import os
import subprocess
import sys

import pytest

from elastic_jax.cost import weight_bytes
from elastic_jax.hlo_cost import KINDS
from elastic_jax.plan.chips import GIB, topology_devices
from elastic_jax.train.programs import stage_program
from elastic_jax.train.setup import make_plan
from experiments.star_elastic_nano_v3 import get_config

STAR = 'experiments/star_elastic_nano_v3.py:one_period'
# One block of each kind, at real widths, a sequence of 1024 tokens on each of four chips.
CUT = (
    '--config.arch.pattern=M*E',
    '--config.mesh.fsdp=4',
    '--config.stages.short.batch_size=4',
    '--config.stages.short.context=1024',
    '--config.budgets.mid=0.8',
    '--config.budgets.small=0.6',
)


def elastic_plan(*arguments):
    command = [sys.executable, '-m', 'elastic_jax', 'plan', '--config', STAR, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_topology_has_its_devices():
    assert len(topology_devices('v5p:2x2x1').devices) == 4
    assert len(topology_devices('v6e:2x2').devices) == 4
    v4 = topology_devices('v4:2x2x1')
    assert (len(v4.devices), v4.hbm_bytes) == (4, 32 * GIB)


def test_flags_of_other_platforms_are_kept_from_the_tpu_compiler(monkeypatch):
    monkeypatch.setenv(
        'XLA_FLAGS', '--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_gpu_autotune_level=0'
    )
    topology_devices('v5p:2x2x1')
    assert os.environ['XLA_FLAGS'] == '--xla_backend_optimization_level=0'


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (('--topology', 'v5q:2x2x1'), 'unknown topology'),
        (('--topology', 'v5p:2x2x1'), 'config.mesh'),
        (
            ('--topology', 'v5p:2x2x1', '--config.mesh.fsdp=4', '--programs', 'short, shart'),
            "unknown program 'shart'; did you mean 'short'",
        ),
        (('--topology', 'v5p:2x2x1', '--config.mesh.fsdq=4'), 'unknown config key'),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence):
    done = elastic_plan(*arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert 'Traceback' not in done.stderr


@pytest.mark.slow
def test_one_period_of_the_published_setting_compiles():
    done = elastic_plan('--topology', 'v5p:2x2x1', '--programs', 'short,decode/small', '--json', *CUT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found['fits']
    config = get_config('one_period')
    config.arch.pattern = 'M*E'
    config.budgets.update({'mid': 0.8, 'small': 0.6})
    plan = make_plan(config, elsewhere=True)
    step, decode = found['hbm_per_chip']['short'], found['hbm_per_chip']['decode/small']
    # Four chips share float32 parameters and two moments; vectors over embed and the experts' biases are whole on each.
    assert step['parameters'] == pytest.approx(weight_bytes(plan.parent, 4.0) / 4, rel=1e-3)
    assert step['optimizer'] == pytest.approx(2 * step['parameters'], rel=1e-6)
    assert step['teacher'] == pytest.approx(step['parameters'] / 2, rel=1e-2)
    assert sum(step[part] for part in step if part not in ('total', 'fits')) == step['total'] < 95 * GIB
    small = plan.parent.narrow(embed=1920, expert_width=960)
    assert decode['parameters'] == pytest.approx(weight_bytes(small), rel=1e-6)
    # In bfloat16 parameters are gathered for the pass of the teacher, forward, and again backward; but not the two tables of the
    # vocabulary, of which one is only read forward, and the other's gradients are made there (model/losses.py).
    tables = 2 * 2.0 * plan.parent.vocab * plan.parent.embed
    gathered = found['collectives']['short']['all-gather']['bytes']
    assert gathered == pytest.approx(3 * weight_bytes(plan.parent) - tables, rel=1e-3)
    assert set(found['collectives']['short']) == set(KINDS)
    assert found['collectives']['short']['all-to-all']['count'] == 0
    assert found['cycles']['short'] > found['cycles']['decode/small'] > found['relayout_cycles']['decode/small'] > 0


@pytest.mark.slow
def test_the_step_for_a_tpu_has_the_kernels_that_the_config_asks_for():
    """Traced and lowered alone; that the compiler takes them is in the test above, whose sequences are as long."""
    by_default = lowered_step('auto')
    assert 'splash_mqa_fwd' in by_default and 'ssd_forward' in by_default and 'LayoutConstraint' in by_default
    without = lowered_step('xla')
    assert 'tpu_custom_call' not in without and 'LayoutConstraint' not in without


def lowered_step(kernels):
    config = get_config('one_period')
    config.arch.pattern, config.kernels = 'M*E', kernels
    config.mesh.fsdp = config.stages.short.batch_size = 4
    config.stages.short.context = 1024
    config.budgets, config.curriculum = {'full': 1.0}, ('short',)
    plan = make_plan(config, elsewhere=True)
    stage = next(stage for stage in plan.stages if stage.name == 'short')
    program = stage_program(plan, stage, {'full': plan.parent}, plan.place(topology_devices('v5p:2x2x1').devices))
    return program.fn.lower(*program.abstract_args).as_text()
