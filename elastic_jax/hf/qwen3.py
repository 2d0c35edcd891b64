"""Qwen3: Llama with a norm over the channels of every query and key head."""

from __future__ import annotations

from typing import Any

from elastic_jax.arch import MLP, Arch, Attention
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.family import Family, refuse
from elastic_jax.hf.llama import ATTENTION_TENSORS, MLP_TENSORS, REPLACED, TOP_TENSORS, mlp_width, shared_arch, shared_config
from elastic_jax.hf.name_map import Names


def to_arch(config: Config) -> Arch:
    config.only('use_sliding_window', False, what='sliding-window attention')
    mlp = MLP(config.whole('intermediate_size'), 'swiglu')
    return shared_arch(config, '*-' * config.whole('num_hidden_layers'), qk_norm=True, mlp=mlp)


def to_config(arch: Arch) -> dict[str, Any]:
    entries = shared_config(arch, 'qwen3', qk_norm=True)
    refuse('qwen3', 'E' in arch.pattern, 'it has no experts')
    return {**entries, **mlp_width(arch, 'qwen3', bias=False), 'use_sliding_window': False}


FAMILY = Family(
    model_type='qwen3',
    architecture='Qwen3ForCausalLM',
    to_arch=to_arch,
    to_config=to_config,
    names=Names(TOP_TENSORS, {Attention: ATTENTION_TENSORS, MLP: MLP_TENSORS}, blocks_per_layer=2),
    replaced=REPLACED,
)
