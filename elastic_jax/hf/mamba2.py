"""Mamba-2 alone; its tensors are called as Nemotron-H's."""

from __future__ import annotations

from typing import Any

from elastic_jax.arch import Arch, Mamba
from elastic_jax.errors import UserError
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.family import Family, common_mixer, homogeneous_widths, kept_pattern, refuse
from elastic_jax.hf.name_map import Names
from elastic_jax.hf.nemotron_h import MAMBA_TENSORS, TOP_TENSORS


def to_arch(config: Config) -> Arch:
    config.only('use_bias', False, what="a bias in Mamba's projections")
    config.only('hidden_act', 'silu', what='another activation')
    limits = config.value('time_step_limit', default=[0.0, float('inf')])
    if not isinstance(limits, list) or len(limits) != 2:
        raise UserError(f'{config.where}: time_step_limit={limits!r} is not a pair of numbers')
    mamba = Mamba(
        heads=config.whole('num_heads'),
        head_dim=config.whole('head_dim'),
        groups=config.whole('n_groups', default=8),
        state=config.whole('state_size'),
        conv=config.whole('conv_kernel', default=4),
        chunk=config.whole('chunk_size', default=256),
        conv_bias=config.flag('use_conv_bias', default=True),
        dt_min=config.as_number('time_step_limit', limits[0]),
        dt_max=config.as_number('time_step_limit', limits[1]),
    )
    return Arch.from_pattern(
        'M' * config.whole('num_hidden_layers'),
        vocab=config.whole('vocab_size'),
        embed=config.whole('hidden_size'),
        norm_eps=config.number('layer_norm_epsilon', default=1e-5),
        tied=config.flag('tie_word_embeddings', default=False),
        mamba=mamba,
    )


def to_config(arch: Arch) -> dict[str, Any]:
    refuse('mamba2', set(kept_pattern(arch)) != {'M'}, f'its blocks are Mamba-2 alone, not {arch.pattern}')
    mamba = common_mixer(arch, Mamba, 'mamba2')
    inner = mamba.heads * mamba.head_dim
    if inner % arch.embed:
        nearest = max(d for d in range(1, arch.embed + 1) if inner % d == 0)
        raise UserError(
            f'mamba2 in transformers needs mamba_heads · mamba_head_dim = {inner} to be a multiple of embed={arch.embed}; '
            f'the nearest it can hold: --widths {homogeneous_widths(arch, embed=nearest)}'
        )
    entries = {
        'vocab_size': arch.vocab,
        'hidden_size': arch.embed,
        'num_hidden_layers': arch.layers,
        'layer_norm_epsilon': arch.norm_eps,
        'tie_word_embeddings': arch.tied,
        'num_heads': mamba.heads,
        'head_dim': mamba.head_dim,
        'expand': inner // arch.embed,
        'n_groups': mamba.groups,
        'state_size': mamba.state,
        'conv_kernel': mamba.conv,
        'chunk_size': mamba.chunk,
        'use_conv_bias': mamba.conv_bias,
        'use_bias': False,
        'hidden_act': 'silu',
    }
    if (mamba.dt_min, mamba.dt_max) != (0.0, float('inf')):
        # JSON has no infinity; transformers writes it so.
        upper = mamba.dt_max if mamba.dt_max != float('inf') else {'__float__': 'Infinity'}
        entries['time_step_limit'] = [mamba.dt_min, upper]
    return entries


FAMILY = Family(
    model_type='mamba2',
    architecture='Mamba2ForCausalLM',
    to_arch=to_arch,
    to_config=to_config,
    names=Names(TOP_TENSORS, {Mamba: MAMBA_TENSORS}),
    replaced=('time_step_limit', 'time_step_rank', 'intermediate_size'),
)
