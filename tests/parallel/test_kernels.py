"""The elastic step over a mesh, remat and documents included, is the same with kernels (interpreted here) as without."""

import jax
import numpy as np
import pytest

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE
from elastic_jax.layout import Layout
from elastic_jax.model import flash
from elastic_jax.model.params import init_params
from elastic_jax.parallel.mesh import make_mesh
from elastic_jax.parallel.placement import Placement
from elastic_jax.train.gradients import loss_and_gradients
from elastic_jax.train.step import StepConfig, elastic_loss

LAYOUT = Layout(kv_heads=2, mlp=2, experts=4, shared_width=2)
PARENT = Arch.from_pattern(
    'M*-E',
    vocab=32,
    embed=16,
    mamba=Mamba(4, 64, groups=2, state=128),
    attention=Attention(2, 2, 8),
    mlp=MLP(32),
    moe=MoE(8, 12, 2, shared_width=8),
)
NAMES = ('ssd_forward', 'splash', 'experts_into', 'experts_gradient_onto', 'conv_silu_by_kernel', 'gated_norm_by_kernel')
BUDGETS = (
    ('full', PARENT),
    ('small', PARENT.narrow(embed=8, mlp=16, query_heads=1, mamba_heads=2, experts=4, expert_width=6)),
    ('mid', PARENT.narrow(embed=12, expert_width=8)),
)


@pytest.mark.slow
def test_loss_and_gradients_are_those_without_kernels(monkeypatch):
    monkeypatch.setattr(flash, 'SHORTEST', 128)
    rng, rows, length = np.random.default_rng(0), 4, 256
    tokens, targets = rng.integers(0, 32, (2, rows, length), dtype=np.int32)
    batch = {
        'tokens': tokens,
        'targets': targets,
        'segment_ids': 1 + np.cumsum(rng.uniform(size=(rows, length)) < 0.03, axis=1, dtype=np.int32),
        'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        'loss_mask': np.ones((rows, length), np.float32),
    }
    mesh = make_mesh({'fsdp': 2, 'tensor': 2})
    place = Placement(mesh, PARENT, LAYOUT)
    learned, teacher = (place.put(init_params(jax.random.key(seed), PARENT, LAYOUT)) for seed in (0, 1))
    found = {}
    for kernels in ('xla', 'pallas'):
        config = StepConfig(LAYOUT, chunk=64, remat=True, scan=True, kernels=kernels, mesh=mesh)
        step = jax.jit(loss_and_gradients(elastic_loss(PARENT, BUDGETS, (0.5, 0.3, 0.2), config), PARENT, config))
        lowered = step.lower(learned, teacher, place.put_whole_batch(batch))
        names = lowered.as_text(debug_info=True)
        assert [name in names for name in NAMES] == [kernels == 'pallas'] * len(NAMES)
        found[kernels] = jax.device_get(lowered.compile()(learned, teacher, place.put_whole_batch(batch)))
    for plain, by_kernel in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(by_kernel, plain, atol=1e-5 * np.abs(plain).max() + 1e-12)
