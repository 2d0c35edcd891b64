"""Nemotron-H: Mamba-2, attention without rotary, relu² MLPs and experts; one mixer per layer."""

from __future__ import annotations

from typing import Any

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE
from elastic_jax.errors import UserError
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.family import Family, attention_from_config, attention_to_config, common_mixer, kept_pattern, refuse
from elastic_jax.hf.name_map import Names

LETTER_OF_TYPE = {'linear_attention': 'M', 'mamba': 'M', 'full_attention': '*', 'attention': '*', 'mlp': '-', 'moe': 'E'}

MAMBA_TENSORS = {
    'backbone.layers.{layer}.norm.weight': ('norm',),
    'backbone.layers.{layer}.mixer.in_proj.weight': ('z', 'x', 'b', 'c', 'dt'),
    'backbone.layers.{layer}.mixer.conv1d.weight': ('conv_x', 'conv_b', 'conv_c'),
    'backbone.layers.{layer}.mixer.conv1d.bias': ('conv_x_bias', 'conv_b_bias', 'conv_c_bias'),
    'backbone.layers.{layer}.mixer.A_log': ('a_log',),
    'backbone.layers.{layer}.mixer.D': ('d',),
    'backbone.layers.{layer}.mixer.dt_bias': ('dt_bias',),
    'backbone.layers.{layer}.mixer.norm.weight': ('gated_norm',),
    'backbone.layers.{layer}.mixer.out_proj.weight': ('out',),
}

TOP_TENSORS = {
    'backbone.embeddings.weight': 'embedding/table',
    'backbone.norm_f.weight': 'final_norm/norm',
    'lm_head.weight': 'unembed/kernel',
}

NAMES = Names(
    top=TOP_TENSORS,
    blocks={
        Mamba: MAMBA_TENSORS,
        Attention: {
            'backbone.layers.{layer}.norm.weight': ('norm',),
            'backbone.layers.{layer}.mixer.q_proj.weight': ('q',),
            'backbone.layers.{layer}.mixer.k_proj.weight': ('k',),
            'backbone.layers.{layer}.mixer.v_proj.weight': ('v',),
            'backbone.layers.{layer}.mixer.o_proj.weight': ('o',),
        },
        MLP: {
            'backbone.layers.{layer}.norm.weight': ('norm',),
            'backbone.layers.{layer}.mixer.up_proj.weight': ('up',),
            'backbone.layers.{layer}.mixer.up_proj.bias': ('up_bias',),
            'backbone.layers.{layer}.mixer.down_proj.weight': ('down',),
            'backbone.layers.{layer}.mixer.down_proj.bias': ('down_bias',),
        },
        MoE: {
            'backbone.layers.{layer}.norm.weight': ('norm',),
            'backbone.layers.{layer}.mixer.gate.weight': ('router',),
            'backbone.layers.{layer}.mixer.gate.e_score_correction_bias': ('correction_bias',),
            'backbone.layers.{layer}.mixer.experts.{expert}.up_proj.weight': ('expert_up',),
            'backbone.layers.{layer}.mixer.experts.{expert}.down_proj.weight': ('expert_down',),
            'backbone.layers.{layer}.mixer.shared_experts.up_proj.weight': ('shared_up',),
            'backbone.layers.{layer}.mixer.shared_experts.down_proj.weight': ('shared_down',),
        },
    },
    # transformers has no tying for this family: it reads lm_head.weight whatever config.json says.
    tied_copy='lm_head.weight',
)


def to_arch(config: Config) -> Arch:
    config.only('num_nextn_predict_layers', 0, what='multi-token prediction')
    config.only('moe_latent_size', what='latent MoE')
    config.only('attention_bias', False, what='a bias in attention')
    for name in ('use_bias', 'mamba_proj_bias'):
        config.only(name, False, what="a bias in Mamba's projections")
    config.only('mlp_hidden_act', 'relu2', what='another activation')
    config.only('mamba_hidden_act', 'silu', what='another activation')
    config.only('sliding_window', what='sliding-window attention')
    pattern = _pattern(config)
    embed = config.whole('hidden_size')
    mlp_bias = config.flag('mlp_bias', default=False)
    if mlp_bias and 'E' in pattern:
        raise UserError(f'{config.where}: mlp_bias=true: a bias in experts is not supported; expected false')
    return Arch.from_pattern(
        pattern,
        vocab=config.whole('vocab_size'),
        embed=embed,
        norm_eps=config.number('layer_norm_epsilon', 'norm_eps', 'rms_norm_eps', default=1e-5),
        tied=config.flag('tie_word_embeddings', default=False),
        mamba=_mamba(config) if 'M' in pattern else None,
        attention=attention_from_config(config, embed) if '*' in pattern else None,
        mlp=MLP(config.whole('intermediate_size'), bias=mlp_bias) if '-' in pattern else None,
        moe=_moe(config) if 'E' in pattern else None,
    )


def _pattern(config: Config) -> str:
    pattern = config.value('hybrid_override_pattern', default=None)
    if pattern is None:
        types = config.value('layers_block_type')
        unknown = [kind for kind in types if kind not in LETTER_OF_TYPE] if isinstance(types, list) else [types]
        if unknown:
            raise UserError(f'{config.where}: unknown layer {unknown[0]!r} in layers_block_type; known: {sorted(LETTER_OF_TYPE)}')
        pattern = ''.join(LETTER_OF_TYPE[kind] for kind in types)
    if not isinstance(pattern, str):
        raise UserError(f'{config.where}: hybrid_override_pattern={pattern!r} is no text such as ME*-; restore it')
    layers = config.whole('num_hidden_layers', default=len(pattern))
    if layers != len(pattern):
        raise UserError(
            f'{config.where}: num_hidden_layers={layers}, but its pattern {pattern!r} has {len(pattern)}; mend one of them'
        )
    return pattern


def _mamba(config: Config) -> Mamba:
    return Mamba(
        heads=config.whole('mamba_num_heads'),
        head_dim=config.whole('mamba_head_dim'),
        groups=config.whole('n_groups'),
        state=config.whole('ssm_state_size'),
        conv=config.whole('conv_kernel', default=4),
        chunk=config.whole('chunk_size', default=128),
        conv_bias=config.flag('use_conv_bias', default=True),
        # transformers clamps to this in prefill and ignores time_step_limit.
        dt_min=config.number('time_step_min', default=0.001),
    )


def _moe(config: Config) -> MoE:
    config.only('n_shared_experts', 1, what='another number of shared experts')
    return MoE(
        experts=config.whole('n_routed_experts'),
        expert_width=config.whole('moe_intermediate_size'),
        top_k=config.whole('num_experts_per_tok'),
        shared_width=config.whole('moe_shared_expert_intermediate_size'),
        groups=config.whole('n_group', default=1),
        top_groups=config.whole('topk_group', default=1),
        normalize=config.flag('norm_topk_prob', default=True),
        scale=config.number('routed_scaling_factor', default=1.0),
    )


def to_config(arch: Arch) -> dict[str, Any]:
    """hybrid_override_pattern and num_hidden_layers are what vLLM reads (from its source: its own config class derives
    layers_block_type and would refuse it); transformers 5 derives its layer list from the pattern too.
    """
    mamba, attention, mlp, moe = (common_mixer(arch, kind, 'nemotron_h') for kind in (Mamba, Attention, MLP, MoE))
    entries = {
        'vocab_size': arch.vocab,
        'hidden_size': arch.embed,
        'hybrid_override_pattern': kept_pattern(arch),
        'num_hidden_layers': arch.layers,
        'layer_norm_epsilon': arch.norm_eps,
        'tie_word_embeddings': arch.tied,
        'mlp_hidden_act': 'relu2',
        'mlp_bias': mlp.bias if mlp else False,
        'attention_bias': False,
        'use_bias': False,
    }
    if mamba:
        refuse('nemotron_h', mamba.dt_max != float('inf'), f'dt_max={mamba.dt_max} has no entry')
        entries |= {
            'mamba_num_heads': mamba.heads,
            'mamba_head_dim': mamba.head_dim,
            'n_groups': mamba.groups,
            'ssm_state_size': mamba.state,
            'conv_kernel': mamba.conv,
            'chunk_size': mamba.chunk,
            'use_conv_bias': mamba.conv_bias,
            'time_step_min': mamba.dt_min,
        }
    if attention:
        extra = attention.rope is not None or attention.qk_norm or attention.bias or attention.output_bias
        refuse('nemotron_h', extra, 'its attention has no rotary embedding, qk-norm or bias')
        entries |= attention_to_config(attention)
    if mlp:
        refuse('nemotron_h', mlp.activation != 'relu2', f'its MLP is relu2, not {mlp.activation}')
        entries['intermediate_size'] = mlp.width
    if moe:
        plain = moe.activation == 'relu2' and moe.scoring == 'sigmoid' and moe.correction_bias
        refuse('nemotron_h', not plain, 'its experts are relu2 with sigmoid scores and a correction bias')
        refuse('nemotron_h', not moe.shared_width, 'it always has a shared expert')
        refuse('nemotron_h', moe.experts < 2, 'it needs at least two experts')
        refuse('nemotron_h', entries['mlp_bias'], 'a bias in the MLP means one in the experts')
        entries |= {
            'n_routed_experts': moe.experts,
            'moe_intermediate_size': moe.expert_width,
            'num_experts_per_tok': moe.top_k,
            'moe_shared_expert_intermediate_size': moe.shared_width,
            'n_shared_experts': 1,
            'n_group': moe.groups,
            'topk_group': moe.top_groups,
            'norm_topk_prob': moe.normalize,
            'routed_scaling_factor': moe.scale,
        }
    return entries


FAMILY = Family(
    model_type='nemotron_h',
    architecture='NemotronHForCausalLM',
    to_arch=to_arch,
    to_config=to_config,
    names=NAMES,
    replaced=('layers_block_type', 'layer_types', 'time_step_limit', 'norm_eps', 'rms_norm_eps'),
)
