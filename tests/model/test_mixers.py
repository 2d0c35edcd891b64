"""Adding a mixer, by doing it: a bilinear block is declared below in some 25 lines, and everything else works with it.

What it takes: a frozen dataclass that describes a block, the parameters it has, the function it computes, and one call.
"""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elastic_jax import cost
from elastic_jax.arch import AXES, LETTERS, Arch, Attention
from elastic_jax.errors import UserError
from elastic_jax.layout import FLAT
from elastic_jax.model.context import HARD, Mixed
from elastic_jax.model.decoder import APPLY, logits
from elastic_jax.model.mixers import register_mixer
from elastic_jax.model.params import DECLARE, Param, param_table
from elastic_jax.nest import importance
from elastic_jax.nest.budgets import make_grid, metric
from elastic_jax.nest.ordering import apply_ordering, make_ordering
from elastic_jax.nest.router import expected_cost
from elastic_jax.train.config import build_arch, default_config
from elastic_jax.train.state import new_state
from elastic_jax.train.step import StepConfig, make_elastic_step
from tests.nest.test_masks import check_masked_equals_sliced, noisy_params
from tests.nest.test_ordering import calibration_batch
from tests.train.test_step import make_batch


@dataclasses.dataclass(frozen=True)
class Bilinear:
    """The product of two projections, `down(left x · right x)`."""

    width: int


def declare_bilinear(mixer, embed, layout, depth_scale):
    del layout, depth_scale  # not stored in blocks; initialised as everything else
    init, into = jax.nn.initializers.lecun_normal(), ('embed', 'bilinear')
    return {
        'left': Param((embed, mixer.width), into, init),
        'right': Param((embed, mixer.width), into, init),
        'down': Param((mixer.width, embed), into[::-1], init, mask=('bilinear', 'embed')),
    }


def bilinear(params, x_BxTxD, mixer, context, cache, soft=HARD):
    del mixer, cache, soft
    product_BxTxF = (x_BxTxD @ params['left'].astype(x_BxTxD.dtype)) * (x_BxTxD @ params['right'].astype(x_BxTxD.dtype))
    taps = {'bilinear': product_BxTxF} if context.taps else {}
    return Mixed(product_BxTxF @ params['down'].astype(x_BxTxD.dtype), None, taps)


@pytest.fixture(scope='module', autouse=True)
def known():
    """The mixer, known for as long as this module's tests run."""
    tables = (LETTERS, AXES, DECLARE, APPLY)
    before = [dict(table) for table in tables]
    register_mixer(Bilinear, 'B', {'bilinear': 'width'}, declare_bilinear, bilinear)
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


def bilinear_arch() -> Arch:
    return Arch.from_pattern('B*B', vocab=64, embed=32, bilinear=Bilinear(24), attention=Attention(2, 2, 8))


def test_it_is_masked_as_it_is_sliced():
    check_masked_equals_sliced(bilinear_arch(), {'embed': 24, 'bilinear': 16, 'bilinear@2': 8}, FLAT)


def test_it_is_ordered_by_importance_and_the_model_stays_the_same():
    arch = bilinear_arch()
    params, batch = noisy_params(arch, FLAT, 0), calibration_batch(arch)
    score = lambda params: importance.scores(importance.accumulate(params, [batch], arch), arch)
    ordered = apply_ordering(params, make_ordering(score(params), arch), arch)
    run = lambda params: logits(params, batch['tokens'], arch, batch['segment_ids'])
    np.testing.assert_allclose(run(ordered), run(params), atol=2e-5 * float(jnp.abs(run(params)).max()))
    assert (np.diff(score(params)['layer_000']['bilinear']) > 0).any()
    assert (np.diff(score(ordered)['layer_000']['bilinear']) <= 1e-4).all()


def test_it_is_costed_and_the_cost_follows_the_expected_width():
    arch = bilinear_arch()
    counts = {name: math.prod(param.shape) for name, param in param_table(arch)['layer_000'].items()}
    assert counts == {'norm': 32, 'left': 32 * 24, 'right': 32 * 24, 'down': 32 * 24}
    # 3 matmuls of 32 x 24 a block; q, k, v, o of 2 x 2 heads and 2 KV heads of 8; half of attention's rectangle; the logits.
    attention = 32 * 32 * 2 + 32 * 16 * 2
    assert cost.flops_per_token(arch, 16) == 2 * (2 * 3 * 32 * 24 + attention + 64 * 32) + 0.5 * 4 * 32 * 16
    grid = make_grid(arch, {'bilinear': (24, 12)})
    measure = metric('parameters', 16)
    halfway = expected_cost(arch, grid, {'bilinear': jnp.asarray([[0.5, 0.5]])}, measure)
    np.testing.assert_allclose(halfway, cost.parameters(arch.narrow(bilinear=18)), rtol=1e-6)


def test_a_step_trains_all_its_sizes():
    arch = bilinear_arch()
    budgets = (('full', arch), ('small', arch.narrow(embed=16, bilinear=8)))
    params, batch = noisy_params(arch, FLAT, 0), make_batch(arch)
    step = make_elastic_step(arch, budgets, (1.0, 1.0), optax.adam(1e-2), StepConfig())
    state, losses = new_state(jax.tree.map(jnp.copy, params), optax.adam(1e-2)), []
    for _ in range(12):
        state, metrics = step(state, params, batch)
        losses.append(float(metrics['loss/small']))
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(state.params['layer_000']['left'], params['layer_000']['left'], atol=1e-3)


def test_it_is_written_in_configs_and_manifests():
    arch = bilinear_arch()
    assert Arch.from_json(arch.to_json()) == arch
    config = default_config()
    config.arch.update({'pattern': 'B', 'vocab': 64, 'embed': 32})
    config.arch.bilinear.update({'width': 24})
    assert build_arch(config).widths()['bilinear'] == 24


@pytest.mark.parametrize(
    ('kind', 'letter', 'axes', 'message'),
    [
        (Bilinear, 'M', {'other': 'width'}, "letter 'M'"),
        (Bilinear, 'X', {'mlp': 'width'}, "axis 'mlp'"),
        (Bilinear, 'X', {'other': 'size'}, 'taken'),
        (dataclasses.make_dataclass('Loose', [('width', int)]), 'X', {'other': 'width'}, 'not a frozen dataclass'),
        (dataclasses.make_dataclass('Other', [('width', int)], frozen=True), 'X', {'other': 'size'}, 'no field size'),
    ],
)
def test_a_name_that_is_taken_or_a_field_that_is_not_there_is_refused(kind, letter, axes, message):
    with pytest.raises(UserError, match=message):
        register_mixer(kind, letter, axes, declare_bilinear, bilinear)
    assert 'X' not in LETTERS and LETTERS['M'].__name__ == 'Mamba'
