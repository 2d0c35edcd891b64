"""The optimiser: which parameters decay, and when gradients are not clipped."""

import jax
import jax.numpy as jnp
import pytest

from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.params import param_table
from elastic_jax.train.config import default_config
from elastic_jax.train.state import make_optimizer
from tests.tiny import HYBRID, OPTIONS, numpy_params

# By name, as Mamba-2 and Llama have them: norms, biases, decays and what else is one number per unit.
NEVER = ('norm', 'gated_norm', 'q_norm', 'k_norm', 'a_log', 'd', 'dt_bias', 'correction_bias')


@pytest.mark.parametrize('layout', [FLAT, Layout(mlp=2, shared_width=2, experts=2, kv_heads=2)], ids=['flat', 'blocked'])
@pytest.mark.parametrize('arch', [HYBRID, OPTIONS], ids=['hybrid', 'options'])
def test_weights_decay_and_norms_biases_and_decays_do_not_in_any_layout(arch, layout):
    """A vector is stored in as many dimensions as its units have: heads in groups, blocks of a width."""
    config = default_config().optimizer
    config.update({'lr': 1.0, 'schedule': 'constant', 'warmup': 0, 'weight_decay': 0.5})
    optimizer, params = make_optimizer(config, 10, param_table(arch, layout)), numpy_params(arch, layout)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for group, own in updates.items():
        for name, update in own.items():
            still = name in NEVER or name.endswith('_bias')
            assert jnp.allclose(update, 0.0 if still else -0.5 * params[group][name]), (group, name)


@pytest.mark.parametrize(('clip', 'expected'), [(0.0, 3.0), (1.5, 1.5)])
def test_a_clip_of_nothing_clips_nothing(clip, expected):
    config = default_config().optimizer
    config.clip = clip
    optimizer = make_optimizer(config, 10)
    grads = {'mlp': {'up': jnp.full(9, 1.0)}}
    _, state = optimizer.update(grads, optimizer.init(grads), grads)
    adam = next(own for own in state if hasattr(own, 'mu'))
    assert jnp.allclose(jnp.linalg.norm(adam.mu['mlp']['up']), expected * (1 - config.b1))
