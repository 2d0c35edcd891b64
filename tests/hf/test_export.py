"""Every slice, exported to a folder, is the same model in plain transformers; and what was exported imports again."""

from __future__ import annotations

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE, parse_widths
from elastic_jax.errors import UserError
from elastic_jax.hf.export import export_folder
from elastic_jax.hf.folder import read_arch
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.params import init_params, leaves, param_table
from elastic_jax.nest.slice import slice_params
from tests.hf.oracle import (
    CASES,
    TOKENS_2x37,
    assert_close,
    load_model,
    load_params,
    make_model,
    our_logits,
    torch_logits,
)

SLICES = {
    'nemotron_h': (
        {'embed': 20},
        {'layers': 4},
        {'query_heads': 1},
        {'kv_heads': 3},
        {'mamba_heads': 6},
        {'mamba_head_dim': 3},
        {'mlp': 20},
        {'experts': 5},
        {'expert_width': 9},
        {'shared_width': 8},
        {'embed': 24, 'mamba_heads': 4, 'mamba_head_dim': 2, 'mlp': 16, 'experts': 4, 'expert_width': 8, 'layers': 5},
    ),
    'nemotron_h routing groups, one Mamba group, tied': ({'experts': 8},),
    'llama': ({'embed': 20}, {'layers': 1}, {'query_heads': 1}, {'kv_heads': 1}, {'mlp': 20}),
    'qwen3': ({'embed': 22, 'query_heads': 1, 'mlp': 20},),
    'qwen3_moe': ({'embed': 20}, {'experts': 4}, {'expert_width': 4}, {'layers': 1, 'kv_heads': 1}),
    'qwen3_moe with a dense layer': ({'mlp': 20, 'experts': 5},),
    'mamba2': ({'embed': 16}, {'mamba_heads': 4, 'layers': 1}),
}


def export(out, params, arch, **kwargs):
    return export_folder(out, arch, lambda group, name: params[group][name], **kwargs)


def same(params: dict, other: dict, arch: Arch, layout: Layout = FLAT) -> bool:
    pairs = [(np.asarray(params[group][name]), other[group][name]) for group, name, _ in leaves(param_table(arch, layout))]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


@pytest.mark.parametrize('case', SLICES)
def test_every_slice_is_the_same_model_in_transformers(case, tmp_path):
    make_model(case, tmp_path / 'parent')
    parent, params = read_arch(tmp_path / 'parent'), load_params(tmp_path / 'parent')
    parent_config = json.loads((tmp_path / 'parent' / 'config.json').read_text())
    for n, widths in enumerate(SLICES[case]):
        child = parent.narrow(widths)
        small = slice_params(params, parent, child)
        out = export(tmp_path / str(n), small, child, dtype='float32', hf_config=parent_config)
        assert_close(our_logits(small, child, TOKENS_2x37), torch_logits(load_model(out), TOKENS_2x37))
        compact = read_arch(out)
        assert compact.mixers == tuple(mixer for mixer in child.mixers if mixer is not None)
