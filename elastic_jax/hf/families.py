"""The model families that can be imported and exported.

Not among them is granitemoehybrid, though every block of it has a mixer here:

- It multiplies embeddings, residuals, attention scores and logits by factors of its own. Those would be fields of the Arch that
  the decoder, the training step over a mesh and generation each apply; folded into the weights they would round a bfloat16
  parent, and what is exported would not be what was imported.
- Its experts come packed in one tensor per block, where the name map has a matrix per expert.
- transformers wants all heads of its Mamba together to be a whole multiple of the embedding, so few slices could go back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_jax.arch import Arch
from elastic_jax.errors import UserError
from elastic_jax.hf import llama, mamba2, nemotron_h, qwen3, qwen3_moe
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (nemotron_h, llama, qwen3, qwen3_moe, mamba2)
}


def family_of(config: Config) -> Family:
    """The family that a config.json names. Raises UserError when it is not supported, or the model is quantised."""
    model_type = config.value('model_type')
    if model_type not in FAMILIES:
        raise UserError(f'{config.where}: model_type {model_type!r} is not supported; supported: {", ".join(FAMILIES)}')
    config.only('quantization_config', what='a quantised model')
    return FAMILIES[model_type]


def arch_of(config: Config) -> Arch:
    """The Arch of a config.json. Raises UserError naming what is not supported or does not fit."""
    try:
        return family_of(config).to_arch(config)
    except UserError as error:
        if config.where in str(error):
            raise
        raise UserError(f'{config.where}: {error}') from error


def family_for(arch: Arch, hf_config: Mapping[str, Any] | None) -> Family:
    """The family to export a model as: its parent's, or the one whose blocks look like it. The family itself then says
    whether it can hold the model.
    """
    if hf_config and hf_config.get('model_type') in FAMILIES:
        return FAMILIES[hf_config['model_type']]
    rotary = any(getattr(mixer, 'rope', None) is not None for mixer in arch.mixers)
    if not rotary:
        return FAMILIES['nemotron_h']
    if 'E' in arch.pattern:
        return FAMILIES['qwen3_moe']
    normed = any(getattr(mixer, 'qk_norm', False) for mixer in arch.mixers)
    return FAMILIES['qwen3' if normed else 'llama']
