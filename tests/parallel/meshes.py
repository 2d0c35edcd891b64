"""Meshes of eight devices, and a parent that splits over all of them, with budgets that narrow every axis."""

import jax
import numpy as np
import pytest

from elastic_jax.layout import Layout
from elastic_jax.parallel.mesh import make_mesh
from tests.nest.test_masks import noisy_params
from tests.tiny import HYBRID
from tests.train.test_step import make_batch

LAYOUT = Layout(mlp=4, shared_width=4, experts=4, kv_heads=2)
BUDGETS = (
    ('full', HYBRID),
    ('mid', HYBRID.narrow(embed=24, mlp=32, experts=4, query_heads=1, shared_width=16)),
    ('small', HYBRID.narrow(embed=16, mlp=16, kv_heads=2, mamba_heads=4, mamba_head_dim=2, expert_width=8, layers=4)),
)
WEIGHTS = (0.5, 0.3, 0.2)
MESHES = {
    'fsdp': {'fsdp': 8},
    'fsdp-tensor': {'fsdp': 4, 'tensor': 2},
    # The KV blocks do not split four ways: attention is whole on each device there.
    'wide-tensor': {'fsdp': 2, 'tensor': 4},
    # The experts' blocks split four ways: they are stored whole, and all else along embed.
    'replica-fsdp': {'replica': 2, 'fsdp': 4},
    'replica-tensor': {'replica': 4, 'tensor': 2},
    'replica-expert': {'replica': 2, 'expert': 4},
    'fsdp-expert': {'fsdp': 2, 'expert': 4},
    'expert-tensor': {'expert': 4, 'tensor': 2},
    'all': {'fsdp': 2, 'expert': 2, 'tensor': 2},
}


# The core suite runs the two that hold every kind of split; the others, which compile as long again, are with the slow tests.
CORE = ('wide-tensor', 'all')
EVERY = [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in MESHES]


def mesh_of(name: str) -> jax.sharding.Mesh:
    return make_mesh({'fsdp': 1} | MESHES[name])


def inputs() -> tuple:
    """(parameters, teacher, batch) with documents of unequal length and padding in every row."""
    batch = make_batch(HYBRID, rows=8)
    batch['loss_mask'] = batch['loss_mask'] * np.asarray([1, 1, 0, 1, 1, 1, 0, 1], np.float32)[:, None]  # uneven devices
    return noisy_params(HYBRID, LAYOUT, 0), noisy_params(HYBRID, LAYOUT, 1), batch
