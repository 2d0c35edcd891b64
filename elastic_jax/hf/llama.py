"""Llama: attention with rotary, then a SwiGLU MLP, in every layer. Qwen3 is told here what it shares."""

from __future__ import annotations

from typing import Any

from elastic_jax.arch import MLP, Arch, Attention
from elastic_jax.errors import UserError
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.family import (
    Family,
    attention_from_config,
    attention_to_config,
    common_mixer,
    homogeneous_widths,
    kept_pattern,
    refuse,
    rope_from_config,
    rope_to_config,
)
from elastic_jax.hf.name_map import Names

TOP_TENSORS = {
    'model.embed_tokens.weight': 'embedding/table',
    'model.norm.weight': 'final_norm/norm',
    'lm_head.weight': 'unembed/kernel',
}

ATTENTION_TENSORS = {
    'model.layers.{layer}.input_layernorm.weight': ('norm',),
    'model.layers.{layer}.self_attn.q_proj.weight': ('q',),
    'model.layers.{layer}.self_attn.q_proj.bias': ('q_bias',),
    'model.layers.{layer}.self_attn.k_proj.weight': ('k',),
    'model.layers.{layer}.self_attn.k_proj.bias': ('k_bias',),
    'model.layers.{layer}.self_attn.v_proj.weight': ('v',),
    'model.layers.{layer}.self_attn.v_proj.bias': ('v_bias',),
    'model.layers.{layer}.self_attn.o_proj.weight': ('o',),
    'model.layers.{layer}.self_attn.o_proj.bias': ('o_bias',),
    'model.layers.{layer}.self_attn.q_norm.weight': ('q_norm',),
    'model.layers.{layer}.self_attn.k_norm.weight': ('k_norm',),
}

MLP_TENSORS = {
    'model.layers.{layer}.post_attention_layernorm.weight': ('norm',),
    'model.layers.{layer}.mlp.gate_proj.weight': ('gate',),
    'model.layers.{layer}.mlp.gate_proj.bias': ('gate_bias',),
    'model.layers.{layer}.mlp.up_proj.weight': ('up',),
    'model.layers.{layer}.mlp.up_proj.bias': ('up_bias',),
    'model.layers.{layer}.mlp.down_proj.weight': ('down',),
    'model.layers.{layer}.mlp.down_proj.bias': ('down_bias',),
}

REPLACED = ('rope_scaling', 'layer_types', 'max_window_layers', 'use_sliding_window', 'sliding_window')


def shared_arch(config: Config, pattern: str, qk_norm: bool, **mixers: Any) -> Arch:
    """The Arch of a Llama-like model; `mixers` are those beside attention."""
    config.only('hidden_act', 'silu', what='another activation')
    embed, bias = config.whole('hidden_size'), config.flag('attention_bias', default=False)
    rope = rope_from_config(config)
    attention = attention_from_config(config, embed, rope=rope, qk_norm=qk_norm, bias=bias, output_bias=bias)
    return Arch.from_pattern(
        pattern,
        vocab=config.whole('vocab_size'),
        embed=embed,
        norm_eps=config.number('rms_norm_eps', default=1e-6),
        tied=config.flag('tie_word_embeddings', default=False),
        unit_blocks=2,
        attention=attention,
        **mixers,
    )


def shared_config(arch: Arch, model_type: str, qk_norm: bool) -> dict[str, Any]:
    """What a Llama-like config.json says of the whole model and its attention."""
    pattern = kept_pattern(arch)
    pairs = [pattern[i : i + 2] for i in range(0, len(pattern), 2)]
    refuse(model_type, any(pair not in ('*-', '*E') for pair in pairs), f'its layers are *- or *E, not {pattern}')
    attention = common_mixer(arch, Attention, model_type)
    refuse(model_type, attention.rope is None, 'its attention is rotary')
    refuse(model_type, attention.qk_norm != qk_norm, f'its attention has {"a" if qk_norm else "no"} qk-norm')
    refuse(model_type, attention.bias != attention.output_bias, 'its attention has either every bias or none')
    return {
        'vocab_size': arch.vocab,
        'hidden_size': arch.embed,
        'num_hidden_layers': len(pairs),
        'rms_norm_eps': arch.norm_eps,
        'tie_word_embeddings': arch.tied,
        'hidden_act': 'silu',
        'attention_bias': attention.bias,
        **attention_to_config(attention),
        **rope_to_config(attention.rope),
    }


def mlp_width(arch: Arch, model_type: str, bias: bool) -> dict[str, Any]:
    mlp = common_mixer(arch, MLP, model_type)
    if mlp is None:
        return {}
    refuse(model_type, mlp.activation != 'swiglu', f'its MLP is swiglu, not {mlp.activation}')
    refuse(model_type, mlp.bias and not bias, 'its MLP has no bias')
    return {'intermediate_size': mlp.width}


def to_arch(config: Config) -> Arch:
    mlp = MLP(config.whole('intermediate_size'), 'swiglu', config.flag('mlp_bias', default=False))
    return shared_arch(config, '*-' * config.whole('num_hidden_layers'), qk_norm=False, mlp=mlp)


def to_config(arch: Arch) -> dict[str, Any]:
    entries = shared_config(arch, 'llama', qk_norm=False)
    refuse('llama', 'E' in arch.pattern, 'it has no experts')
    heads = entries['num_attention_heads']
    if arch.embed % heads:
        nearest = max(1, arch.embed // heads) * heads
        raise UserError(
            f'llama in transformers needs embed={arch.embed} to be a multiple of its {heads} query heads; the nearest it can '
            f'hold: --widths {homogeneous_widths(arch, embed=nearest)}'
        )
    mlp = common_mixer(arch, MLP, 'llama')
    return {**entries, **mlp_width(arch, 'llama', bias=True), 'mlp_bias': mlp.bias}


FAMILY = Family(
    model_type='llama',
    architecture='LlamaForCausalLM',
    to_arch=to_arch,
    to_config=to_config,
    names=Names(TOP_TENSORS, {Attention: ATTENTION_TENSORS, MLP: MLP_TENSORS}, blocks_per_layer=2),
    replaced=REPLACED,
)
