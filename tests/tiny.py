"""Tiny architectures of every family, shared by the tests."""

import numpy as np

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE, Rope
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.params import map_table, param_table

# All four mixers, Nemotron-H style: relu², untied, no rotary.
HYBRID = Arch.from_pattern(
    'ME*-E',
    vocab=64,
    embed=32,
    mamba=Mamba(heads=8, head_dim=4, groups=2, state=8, chunk=8),
    attention=Attention(kv_heads=4, query_heads=2, head_dim=8),
    mlp=MLP(width=48),
    moe=MoE(experts=8, expert_width=16, top_k=2, shared_width=24, scale=2.5),
)

# Group-limited routing: the best 2 of 4 groups of 4 experts.
GROUPED_MOE = Arch.from_pattern(
    '*E',
    vocab=64,
    embed=32,
    attention=Attention(kv_heads=2, query_heads=2, head_dim=8),
    moe=MoE(experts=16, expert_width=8, top_k=3, shared_width=8, groups=4, top_groups=2),
)

# Llama: rotary, SwiGLU, tied; a drop unit is attention + MLP.
LLAMA = Arch.from_pattern(
    '*-*-',
    vocab=64,
    embed=32,
    attention=Attention(kv_heads=2, query_heads=2, head_dim=8, rope=Rope(theta=500000.0)),
    mlp=MLP(width=48, activation='swiglu'),
    tied=True,
    unit_blocks=2,
)

# Qwen3-MoE: rotary, qk-norm, softmax scoring without bias or shared expert.
QWEN_MOE = Arch.from_pattern(
    '*E*E',
    vocab=64,
    embed=32,
    attention=Attention(kv_heads=2, query_heads=2, head_dim=8, rope=Rope(theta=1e6), qk_norm=True),
    moe=MoE(experts=8, expert_width=12, top_k=2, activation='swiglu', scoring='softmax', correction_bias=False),
    unit_blocks=2,
)

# Every option that the others leave at its default.
OPTIONS = Arch.from_pattern(
    'M*-E',
    vocab=64,
    embed=32,
    mamba=Mamba(heads=4, head_dim=4, groups=1, state=8, conv=3, chunk=8, conv_bias=False, dt_min=0.01, dt_max=0.05),
    attention=Attention(2, 2, 8, rope=Rope(1e4, (8.0, 1.0, 4.0, 32.0)), bias=True, output_bias=True),
    mlp=MLP(width=32, activation='swiglu', bias=True),
    moe=MoE(
        experts=8,
        expert_width=8,
        top_k=3,
        shared_width=16,
        activation='swiglu',
        scoring='softmax',
        groups=2,
        top_groups=1,
        normalize=False,
        scale=0.5,
    ),
    norm_eps=1e-3,
)

FAMILIES = {'hybrid': HYBRID, 'grouped_moe': GROUPED_MOE, 'llama': LLAMA, 'qwen_moe': QWEN_MOE, 'options': OPTIONS}


def numpy_params(arch: Arch, layout: Layout = FLAT, seed: int = 0, dtype: type = np.float32) -> dict[str, dict[str, np.ndarray]]:
    """Random parameters that nothing was compiled for; no norm's scale is one and no bias zero."""
    rng = np.random.default_rng(seed)
    return map_table(lambda param: (0.3 * rng.normal(size=param.shape)).astype(dtype), param_table(arch, layout))
