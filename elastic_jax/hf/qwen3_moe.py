"""Qwen3-MoE: Qwen3 with SwiGLU experts, softmax scores and no shared expert; some layers may keep a dense MLP."""

from __future__ import annotations

from typing import Any

from elastic_jax.arch import MLP, Arch, Attention, MoE
from elastic_jax.errors import UserError
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.family import Family, common_mixer, kept_pattern, refuse
from elastic_jax.hf.llama import ATTENTION_TENSORS, MLP_TENSORS, REPLACED, TOP_TENSORS, mlp_width, shared_arch, shared_config
from elastic_jax.hf.name_map import Names

MOE_TENSORS = {
    'model.layers.{layer}.post_attention_layernorm.weight': ('norm',),
    'model.layers.{layer}.mlp.gate.weight': ('router',),
    'model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight': ('expert_gate',),
    'model.layers.{layer}.mlp.experts.{expert}.up_proj.weight': ('expert_up',),
    'model.layers.{layer}.mlp.experts.{expert}.down_proj.weight': ('expert_down',),
}


def to_arch(config: Config) -> Arch:
    config.only('use_sliding_window', False, what='sliding-window attention')
    every, dense = config.whole('decoder_sparse_step', default=1), config.value('mlp_only_layers', default=[])
    if every < 1 or not isinstance(dense, list):
        found = f'decoder_sparse_step={every} and mlp_only_layers={dense!r}'
        raise UserError(f'{config.where}: {found} must be a number, at least 1, and a list of layers; restore them')
    experts = config.whole('num_experts', 'num_local_experts', default=128)
    is_moe = [i not in dense and experts > 0 and (i + 1) % every == 0 for i in range(config.whole('num_hidden_layers'))]
    moe = MoE(
        experts=experts,
        expert_width=config.whole('moe_intermediate_size'),
        top_k=config.whole('num_experts_per_tok'),
        activation='swiglu',
        scoring='softmax',
        correction_bias=False,
        normalize=config.flag('norm_topk_prob', default=False),
    )
    mlp = None if all(is_moe) else MLP(config.whole('intermediate_size'), 'swiglu')
    return shared_arch(config, ''.join('*E' if sparse else '*-' for sparse in is_moe), qk_norm=True, mlp=mlp, moe=moe)


def to_config(arch: Arch) -> dict[str, Any]:
    entries = shared_config(arch, 'qwen3_moe', qk_norm=True)
    moe = common_mixer(arch, MoE, 'qwen3_moe')
    refuse('qwen3_moe', moe is None, 'it has no experts')
    plain = moe.activation == 'swiglu' and moe.scoring == 'softmax' and not moe.correction_bias
    refuse('qwen3_moe', not plain, 'its experts are swiglu with softmax scores and no correction bias')
    refuse('qwen3_moe', bool(moe.shared_width) or moe.groups > 1, 'it has no shared expert and no routing groups')
    refuse('qwen3_moe', moe.scale != 1.0, 'it does not scale the experts')
    return {
        **entries,
        **mlp_width(arch, 'qwen3_moe', bias=False),
        # vLLM and transformers 4 read num_experts, transformers 5 either.
        'num_experts': moe.experts,
        'num_experts_per_tok': moe.top_k,
        'moe_intermediate_size': moe.expert_width,
        'norm_topk_prob': moe.normalize,
        'decoder_sparse_step': 1,
        'mlp_only_layers': [i for i, letter in enumerate(kept_pattern(arch)[1::2]) if letter == '-'],
        'use_sliding_window': False,
    }


FAMILY = Family(
    model_type='qwen3_moe',
    architecture='Qwen3MoeForCausalLM',
    to_arch=to_arch,
    to_config=to_config,
    names=Names(TOP_TENSORS, {Attention: ATTENTION_TENSORS, MLP: MLP_TENSORS, MoE: MOE_TENSORS}, blocks_per_layer=2),
    replaced=(*REPLACED, 'num_local_experts'),
)
