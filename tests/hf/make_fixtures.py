"""Writes the committed fixtures: tiny models of transformers and their logits.   python -m tests.hf.make_fixtures"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from tests.hf.oracle import CASES, make_model, torch_logits
from tests.hf.ours import FIXTURES, TOKENS_2x37

TINY = {
    'nemotron_h': {'hidden_size': 16, 'hybrid_override_pattern': 'ME*-', 'n_routed_experts': 4, 'intermediate_size': 12},
    'llama tied, MQA, llama3 rotary, biases': {'hidden_size': 16, 'intermediate_size': 12},
    'qwen3': {'hidden_size': 16, 'intermediate_size': 12, 'head_dim': 4},
    'qwen3_moe': {'hidden_size': 16, 'head_dim': 4, 'num_experts': 4, 'moe_intermediate_size': 4},
    'mamba2': {'hidden_size': 16, 'head_dim': 4},
}


def make(folder: Path) -> None:
    for case, changes in TINY.items():
        model_type, entries = CASES[case]
        CASES['fixture'] = (model_type, entries | changes)
        own = folder / model_type
        shutil.rmtree(own, ignore_errors=True)
        model = make_model('fixture', own)
        (own / 'generation_config.json').unlink()
        np.save(own / 'logits.npy', torch_logits(model, TOKENS_2x37))


if __name__ == '__main__':
    make(FIXTURES)
