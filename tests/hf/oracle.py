"""Tiny random models of transformers, the oracle for the model code and for the files on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(2)


HYBRID = {
    'vocab_size': 64,
    'hidden_size': 32,
    'hybrid_override_pattern': 'ME*-M',
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 8,
    'intermediate_size': 48,
    'ssm_state_size': 8,
    'mamba_num_heads': 8,
    'mamba_head_dim': 4,
    'n_groups': 2,
    'chunk_size': 16,
    'n_routed_experts': 8,
    'moe_intermediate_size': 16,
    'moe_shared_expert_intermediate_size': 24,
    'num_experts_per_tok': 2,
    'routed_scaling_factor': 2.5,
}
LLAMA = {
    'vocab_size': 64,
    'hidden_size': 32,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'intermediate_size': 48,
    'max_position_embeddings': 128,
}
LLAMA3_ROPE = {
    'rope_type': 'llama3',
    'rope_theta': 5e5,
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}
QWEN = {**LLAMA, 'head_dim': 16}
QWEN_MOE = {**QWEN, 'num_experts': 8, 'moe_intermediate_size': 12, 'num_experts_per_tok': 3}
MAMBA2 = {
    'vocab_size': 64,
    'hidden_size': 32,
    'num_hidden_layers': 2,
    'num_heads': 8,
    'head_dim': 8,
    'n_groups': 2,
    'state_size': 8,
    'chunk_size': 16,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    'nemotron_h': ('nemotron_h', HYBRID),
    'nemotron_h dense, four groups, MQA': (
        'nemotron_h',
        HYBRID | {'hybrid_override_pattern': 'M-*-M', 'n_groups': 4, 'num_key_value_heads': 1, 'time_step_min': 0.3},
    ),
    'nemotron_h routing groups, one Mamba group, tied': (
        'nemotron_h',
        HYBRID
        | {'n_group': 4, 'topk_group': 2, 'n_groups': 1, 'num_key_value_heads': 8, 'tie_word_embeddings': True}
        | {'n_routed_experts': 16, 'num_experts_per_tok': 3, 'norm_topk_prob': False, 'use_conv_bias': False},
    ),
    'nemotron_h odd widths': (
        'nemotron_h',
        HYBRID
        | {'hidden_size': 30, 'mamba_num_heads': 6, 'mamba_head_dim': 5, 'head_dim': 7, 'intermediate_size': 37, 'chunk_size': 7}
        | {'n_routed_experts': 5, 'moe_intermediate_size': 11, 'moe_shared_expert_intermediate_size': 9, 'conv_kernel': 3},
    ),
    'llama': ('llama', LLAMA),
    'llama tied, MQA, llama3 rotary, biases': (
        'llama',
        LLAMA
        | {'tie_word_embeddings': True, 'num_key_value_heads': 1, 'rope_parameters': LLAMA3_ROPE}
        | {'attention_bias': True, 'mlp_bias': True},
    ),
    'llama odd widths, no grouping': (
        'llama',
        LLAMA | {'hidden_size': 36, 'head_dim': 6, 'intermediate_size': 41, 'num_attention_heads': 3, 'num_key_value_heads': 3},
    ),
    'qwen3': ('qwen3', QWEN | {'attention_bias': True}),
    'qwen3 tied': ('qwen3', QWEN | {'tie_word_embeddings': True, 'hidden_size': 34, 'intermediate_size': 29}),
    'qwen3_moe': ('qwen3_moe', QWEN_MOE),
    'qwen3_moe with a dense layer': ('qwen3_moe', QWEN_MOE | {'mlp_only_layers': [0], 'norm_topk_prob': True}),
    'mamba2': ('mamba2', MAMBA2),
    'mamba2 clamped, one group, tied': (
        'mamba2',
        MAMBA2 | {'n_groups': 1, 'tie_word_embeddings': True, 'time_step_limit': (0.05, 0.2)},
    ),
}


def make_model(case: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    """A random float32 model, saved to `folder`. No parameter keeps the value it would have by default."""
    model_type, entries = CASES[case]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **entries)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation='eager').eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if 'inv_freq' in name:
                continue
            if name.endswith(('A_log', 'dt_bias', 'mixer.D')):
                tensor.copy_(torch.randn_like(tensor) * 0.5)
            elif tensor.ndim == 1:
                tensor.copy_(tensor + 0.3 * torch.randn_like(tensor))
            else:
                tensor.copy_(torch.randn_like(tensor) * (0.7 / tensor.shape[-1] ** 0.5))
        if config.tie_word_embeddings:  # transformers ties all families but nemotron_h
            model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    model.save_pretrained(folder)
    return model


def load_model(folder: Path, **kwargs: Any) -> torch.nn.Module:
    """The folder through plain AutoModelForCausalLM; every tensor must have been found."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
    return model.eval()


def torch_logits(model: torch.nn.Module, tokens_BxT: np.ndarray, mask_BxT: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        mask = None if mask_BxT is None else torch.tensor(mask_BxT)
        return model(torch.tensor(tokens_BxT), attention_mask=mask, use_cache=False).logits.float().numpy()


def torch_greedy(model: torch.nn.Module, prompt_BxT: np.ndarray, new: int) -> np.ndarray:
    """The prompts and `new` tokens after each, by transformers' prefill and its one-token steps."""
    prompt = torch.tensor(prompt_BxT)
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None).numpy()
