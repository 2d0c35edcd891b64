"""Imported models give transformers' logits: the first outside oracle of the model code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import LlamaConfig

from elastic_jax.cost import active_parameters, parameters
from elastic_jax.errors import UserError
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.families import FAMILIES
from elastic_jax.hf.folder import read_arch
from tests.hf.oracle import CASES, make_model, torch_logits
from tests.hf.ours import TOKENS_2x37, assert_close, load_params, our_logits
from tests.tiny import LLAMA, QWEN_MOE


@pytest.mark.parametrize('case', CASES)
def test_imported_model_gives_the_logits_of_transformers(case, tmp_path):
    model = make_model(case, tmp_path)
    arch, params = read_arch(tmp_path), load_params(tmp_path)
    mask_BxT = np.ones_like(TOKENS_2x37)
    mask_BxT[0, :9] = 0  # padding on the left of the first row
    ours, theirs = our_logits(params, arch, TOKENS_2x37, mask_BxT), torch_logits(model, TOKENS_2x37, mask_BxT)
    assert_close(ours[mask_BxT == 1], theirs[mask_BxT == 1])


@pytest.fixture(scope='module')
def parent(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('parent')
    make_model('nemotron_h', folder)
    return folder


@pytest.fixture
def damaged(parent, tmp_path) -> Path:
    return Path(shutil.copytree(parent, tmp_path / 'model'))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        read_arch(folder)
        load_params(folder)
    message = str(raised.value)
    assert '\n' not in message and ('model' in message)
    return message


def rewrite(folder: Path, change) -> None:
    tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors')


CONFIG_FAULTS = {
    'unknown type': ({'model_type': 'gpt2'}, 'nemotron_h, llama, qwen3, qwen3_moe'),
    'multi-token prediction': ({'num_nextn_predict_layers': 1}, 'multi-token prediction'),
    'latent experts': ({'moe_latent_size': 16}, 'latent MoE'),
    'quantised': ({'quantization_config': {'quant_method': 'fp8'}}, 'quantised'),
    'bias': ({'use_bias': True}, 'bias'),
    'activation': ({'mlp_hidden_act': 'gelu'}, 'gelu'),
    'missing key': ({'mamba_num_heads': None}, 'mamba_num_heads'),
    'ill-typed key': ({'hidden_size': '32'}, 'hidden_size'),
    'another width': ({'intermediate_size': 40}, '[48, 32], config.json means [40, 32]'),
    'another pattern': ({'hybrid_override_pattern': 'ME*-M', 'num_hidden_layers': 9}, 'num_hidden_layers=9'),
    'wrong groups': ({'n_groups': 3}, '3 groups'),
    'no groups': ({'n_groups': 0}, 'groups@0=0 must be at least 1'),
    'no heads': ({'num_attention_heads': 0}, 'num_attention_heads=0'),
    'pattern that is no text': ({'hybrid_override_pattern': 5}, 'hybrid_override_pattern=5 is no text'),
}


@pytest.mark.parametrize('entries', [{'decoder_sparse_step': 0}, {'mlp_only_layers': 3}], ids=str)
def test_which_layers_have_experts_must_be_said(entries):
    described = FAMILIES['qwen3_moe'].to_config(QWEN_MOE)
    (name,) = entries
    with pytest.raises(UserError, match=f'{name}={entries[name]}'):
        FAMILIES['qwen3_moe'].to_arch(Config(described | entries))


def test_of_two_rotary_embeddings_transformers_takes_the_older_one():
    linear = {'rope_type': 'linear', 'factor': 2.0}
    described = FAMILIES['llama'].to_config(LLAMA)
    assert LlamaConfig(**described, rope_scaling=dict(linear)).rope_parameters == linear | {'rope_theta': 500000.0}
    with pytest.raises(UserError, match="rope_scaling: rope_type='linear' is not supported"):
        FAMILIES['llama'].to_arch(Config(described | {'rope_scaling': linear}))
    assert FAMILIES['llama'].to_arch(Config(described | {'rope_scaling': {}})) == LLAMA


@pytest.mark.parametrize('fault', CONFIG_FAULTS)
def test_config_that_does_not_fit_is_refused_by_name(fault, damaged):
    entries, reason = CONFIG_FAULTS[fault]
    config = json.loads((damaged / 'config.json').read_text())
    (damaged / 'config.json').write_text(json.dumps(config | entries))
    assert reason in refused(damaged)


def test_missing_extra_and_quantised_tensors_are_named(damaged):
    rewrite(damaged, lambda tensors: tensors.pop('backbone.layers.1.mixer.experts.3.up_proj.weight'))
    assert 'lacks backbone.layers.1.mixer.experts.3.up_proj.weight' in refused(damaged)
    rewrite(damaged, lambda t: t.update({'backbone.layers.1.mixer.experts.3.up_proj.weight': np.ones((16, 32), np.int8)}))
    assert 'quantised' in refused(damaged)
    rewrite(damaged, lambda t: t.update({'backbone.layers.1.mixer.experts.3.up_proj.weight': np.ones((16, 32), np.float64)}))
    assert 'is float64; convert it to float32' in refused(damaged)
    rewrite(damaged, lambda tensors: tensors.update({'backbone.layers.9.norm.weight': np.ones(32, np.float32)}))
    assert 'unexpected backbone.layers.9.norm.weight' in refused(damaged)
    rewrite(damaged, lambda tensors: tensors.update({'mtp.layers.0.norm.weight': np.ones(32, np.float32)}))
    assert 'multi-token prediction (mtp.layers.0.norm.weight)' in refused(damaged)


def test_damaged_files_are_refused(damaged):
    path = damaged / 'model.safetensors'
    whole = path.read_bytes()
    for size, reason in ((len(whole) - 1, 'truncated'), (100, 'cut off'), (3, 'cut off'), (0, 'cut off')):
        path.write_bytes(whole[:size])
        assert reason in refused(damaged)
    path.write_bytes(whole[:8] + b'x' * (len(whole) - 8))
    assert 'damaged header' in refused(damaged)
    path.unlink()
    assert 'no model.safetensors' in refused(damaged)
    (damaged / 'pytorch_model.bin').write_bytes(b'\x80\x02')
    assert 'pickle' in refused(damaged)
    (damaged / 'model.safetensors.index.json').write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert 'lacks model-1.safetensors' in refused(damaged)
    (damaged / 'config.json').write_text('{')
    assert 'not JSON' in refused(damaged)


def test_tied_model_may_repeat_its_embedding_but_not_contradict_it(tmp_path):
    make_model('llama tied, MQA, llama3 rotary, biases', tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({'lm_head.weight': tensors['model.embed_tokens.weight'].copy()}))
    assert 'unembed' not in load_params(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({'lm_head.weight': tensors['model.embed_tokens.weight'] + 1}))
    with pytest.raises(UserError, match='differs from the embedding'):
        load_params(tmp_path)


def test_older_spelling_of_the_rotary_embedding_means_the_same(tmp_path):
    make_model('llama tied, MQA, llama3 rotary, biases', tmp_path)
    new = read_arch(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    rope = config.pop('rope_parameters')
    old = {'rope_theta': rope.pop('rope_theta'), 'rope_scaling': rope}
    (tmp_path / 'config.json').write_text(json.dumps(config | old))
    assert read_arch(tmp_path) == new
    (tmp_path / 'config.json').write_text(json.dumps(config | {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}}))
    with pytest.raises(UserError, match="'yarn' is not supported"):
        read_arch(tmp_path)


def test_bfloat16_file_is_read_without_torch(tmp_path):
    model = make_model('qwen3', tmp_path / 'full')
    model.to(torch.bfloat16).save_pretrained(tmp_path / 'half')
    params = load_params(tmp_path / 'half')
    stored = model.state_dict()['model.layers.1.mlp.up_proj.weight'].float().numpy()
    assert params['layer_003']['up'].dtype == ml_dtypes.bfloat16
    assert np.array_equal(params['layer_003']['up'].reshape(32, 48).T.astype(np.float32), stored)


def test_config_of_the_published_parent_gives_the_published_counts(tmp_path):
    """NVIDIA-Nemotron-3-Nano-30B-A3B: 31.58B parameters, 3.58B active (method.md §1); keys as its config.json spells them."""
    config = {
        'model_type': 'nemotron_h',
        'hybrid_override_pattern': 'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME',
        'num_hidden_layers': 52,
        'hidden_size': 2688,
        'vocab_size': 131072,
        'tie_word_embeddings': False,
        'num_attention_heads': 32,
        'num_key_value_heads': 2,
        'head_dim': 128,
        'mamba_num_heads': 64,
        'mamba_head_dim': 64,
        'n_groups': 8,
        'ssm_state_size': 128,
        'conv_kernel': 4,
        'chunk_size': 128,
        'time_step_limit': [0.0, float('inf')],
        'time_step_min': 0.001,
        'intermediate_size': 1856,
        'n_routed_experts': 128,
        'n_shared_experts': 1,
        'moe_intermediate_size': 1856,
        'moe_shared_expert_intermediate_size': 3712,
        'num_experts_per_tok': 6,
        'routed_scaling_factor': 2.5,
        'norm_topk_prob': True,
        'n_group': 1,
        'topk_group': 1,
        'mlp_hidden_act': 'relu2',
        'layer_norm_epsilon': 1e-5,
    }
    (tmp_path / 'config.json').write_text(json.dumps(config))
    arch = read_arch(tmp_path)
    assert f'{parameters(arch) / 1e9:.2f}B/{active_parameters(arch) / 1e9:.2f}B' == '31.58B/3.58B'
    small = arch.narrow(embed=1920, expert_width=960)
    assert f'{parameters(small) / 1e9:.2f}B/{active_parameters(small) / 1e9:.2f}B' == '12.43B/2.08B'
