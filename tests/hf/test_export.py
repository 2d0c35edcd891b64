"""Every slice, exported to a folder, is the same model in plain transformers; and what was exported imports again."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from elastic_jax.arch import MLP, Arch, Attention, Mamba, Rope, parse_widths
from elastic_jax.errors import UserError, WorkError
from elastic_jax.hf.export import export_folder
from elastic_jax.hf.folder import read_arch
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.params import leaves, map_table, param_table
from elastic_jax.nest.slice import slice_params
from tests.hf.oracle import load_model, make_model, torch_greedy, torch_logits
from tests.hf.ours import TOKENS_2x37, assert_close, load_params, our_logits
from tests.tiny import GROUPED_MOE, HYBRID, LLAMA, QWEN_MOE

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
        {'embed': 24, 'mamba_heads': 4, 'mamba_head_dim': 2, 'mlp': 16, 'experts': 4, 'expert_width': 8, 'layers': 3},
    ),
    'nemotron_h routing groups, one Mamba group, tied': ({'experts': 8},),
    'llama': ({'embed': 20}, {'layers': 1}, {'query_heads': 1}, {'kv_heads': 1}, {'mlp': 20}),
    'qwen3': ({'embed': 22, 'query_heads': 1, 'mlp': 20},),
    'qwen3_moe': ({'embed': 20}, {'experts': 4}, {'expert_width': 4}, {'layers': 1, 'kv_heads': 1}),
    'qwen3_moe with a dense layer': ({'mlp': 20, 'experts': 5},),
    'mamba2': ({'embed': 16}, {'mamba_heads': 4, 'layers': 1}),
}


def export(out: Path, params: dict, arch: Arch, **kwargs) -> Path:
    return export_folder(out, arch, lambda group, name, index: np.asarray(params[group][name])[index], **kwargs)


def random_params(arch: Arch, layout: Layout = FLAT) -> dict:
    """Parameters of which no two are the same, so that a mix-up shows."""
    noise = np.random.default_rng(2)
    return map_table(lambda param: noise.standard_normal(param.shape, np.float32), param_table(arch, layout))


@pytest.mark.parametrize('case', SLICES)
def test_every_slice_is_the_same_model_in_transformers(case, tmp_path):
    make_model(case, tmp_path / 'parent')
    parent, params = read_arch(tmp_path / 'parent'), load_params(tmp_path / 'parent')
    parent_config = json.loads((tmp_path / 'parent' / 'config.json').read_text())
    for n, widths in enumerate(SLICES[case]):
        child = parent.narrow(widths)
        small = slice_params(params, parent, child)
        out = export(tmp_path / str(n), small, child, dtype='float32', hf_config=parent_config)
        model = load_model(out)
        assert_close(our_logits(small, child, TOKENS_2x37), torch_logits(model, TOKENS_2x37))
        if not any(isinstance(mixer, Mamba) and mixer.dt_min for mixer in child.mixers):
            assert_greedy_tokens_are_ours(model, small, child)


def assert_greedy_tokens_are_ours(model: torch.nn.Module, params: dict, arch: Arch) -> None:
    """Each token that transformers chose is our best after those before it: greedy decoding, in one pass of ours."""
    tokens_2x37 = torch_greedy(model, TOKENS_2x37[:, :25], 12)
    assert np.array_equal(our_logits(params, arch, tokens_2x37)[:, 24:-1].argmax(-1), tokens_2x37[:, 25:])


@pytest.mark.parametrize('case', ['nemotron_h', 'nemotron_h dense, four groups, MQA'])
def test_greedy_tokens_of_slices_with_mamba_are_the_same(case, tmp_path):
    """At time_step_min = 0, where transformers' prefill and its one-token decode agree (platform: it clamps only the first)."""
    make_model(case, tmp_path / 'parent')
    config = json.loads((tmp_path / 'parent' / 'config.json').read_text()) | {'time_step_min': 0.0}
    (tmp_path / 'parent' / 'config.json').write_text(json.dumps(config))
    parent, params = read_arch(tmp_path / 'parent'), load_params(tmp_path / 'parent')
    child = parent.narrow({'embed': 24, 'mamba_heads': 4, 'mlp': 20, 'layers': 4})
    assert {mixer.dt_min for mixer in child.mixers if isinstance(mixer, Mamba)} == {0.0}
    small = slice_params(params, parent, child)
    model = load_model(export(tmp_path / 'out', small, child, dtype='float32', hf_config=config))
    assert_greedy_tokens_are_ours(model, small, child)


LAYOUTS = {
    'hybrid': (HYBRID, Layout(mlp=4, shared_width=2, experts=2, kv_heads=2)),
    'routing groups': (GROUPED_MOE, Layout(shared_width=4, kv_heads=2)),
    'llama': (LLAMA, Layout(mlp=2)),
    'qwen_moe': (QWEN_MOE, Layout(experts=4, kv_heads=2)),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_export_then_import_is_bit_for_bit_the_same(name, tmp_path, monkeypatch):
    arch, layout = LAYOUTS[name]
    params = random_params(arch, layout)
    monkeypatch.setattr('elastic_jax.hf.export.PART_BYTES', 1000)  # leaves are read and written in several parts
    out = export(tmp_path / 'out', params, arch, layout=layout, dtype='float32', max_shard_bytes=20_000)
    assert len(list(out.glob('*.safetensors'))) > 1
    assert read_arch(out).mixers == arch.mixers
    again = load_params(out, layout)
    for group, leaf, param in leaves(param_table(arch, layout)):
        assert again[group][leaf].shape == param.shape
        assert again[group][leaf].tobytes() == params[group][leaf].tobytes(), f'{group}/{leaf}'


def test_blocked_layout_is_written_in_rank_order(tmp_path):
    """Units of a blocked axis lie at (rank mod G, rank div G); files list them by rank, whatever G is."""
    flat = random_params(HYBRID)
    layout = Layout(mlp=4, shared_width=2, experts=2, kv_heads=2)
    export(tmp_path / 'flat', flat, HYBRID, dtype='float32')
    blocked = load_params(tmp_path / 'flat', layout)
    assert np.array_equal(blocked['layer_003']['up'][:, 1, 2], flat['layer_003']['up'][:, 0, 2 * 4 + 1])
    assert np.array_equal(blocked['layer_001']['expert_up'][1, 2], flat['layer_001']['expert_up'][0, 2 * 2 + 1])
    export(tmp_path / 'blocked', blocked, HYBRID, layout=layout, dtype='float32')
    for name in ('model.safetensors', 'config.json'):
        assert (tmp_path / 'flat' / name).read_bytes() == (tmp_path / 'blocked' / name).read_bytes()


def test_bfloat16_export_agrees_within_its_rounding(tmp_path):
    make_model('nemotron_h', tmp_path / 'parent')
    arch, params = read_arch(tmp_path / 'parent'), load_params(tmp_path / 'parent')
    out = export(tmp_path / 'out', params, arch, dtype='bfloat16', max_shard_bytes=20_000)
    model = load_model(out, dtype='auto')
    assert model.dtype == torch.bfloat16 and len(list(out.glob('model-*-of-*.safetensors'))) > 1
    again = load_params(out)
    for group, name, param in leaves(param_table(arch)):
        wanted = params[group][name] if param.float32 else params[group][name].astype(again[group][name].dtype)
        assert np.array_equal(again[group][name], wanted), f'{group}/{name}'
    # 2^-8 is bfloat16's rounding; some twenty roundings follow each other here.
    assert_close(our_logits(params, arch, TOKENS_2x37), torch_logits(load_model(out, dtype=torch.float32), TOKENS_2x37), 0.05)


def test_config_is_what_vllm_reads_and_carries_no_code(tmp_path):
    parent = {
        'model_type': 'nemotron_h',
        'auto_map': {'AutoModel': 'x.Y'},
        'layers_block_type': ['moe'],
        'max_position_embeddings': 77,
        'time_step_limit': [0.0, 1.0],
    }
    arch = HYBRID.narrow(embed=24, layers=4)
    out = export(tmp_path / 'out', slice_params(random_params(HYBRID), HYBRID, arch), arch, hf_config=parent)
    config = json.loads((out / 'config.json').read_text())
    assert config['hybrid_override_pattern'] == 'ME*-' and config['num_hidden_layers'] == 4
    assert config['max_position_embeddings'] == 77 and config['hidden_size'] == 24
    assert not {'auto_map', 'layers_block_type', 'time_step_limit'} & set(config)
    bare = export(tmp_path / 'bare', random_params(HYBRID), HYBRID, eos_token_id=3, context=48)
    assert json.loads((bare / 'generation_config.json').read_text()) == {'eos_token_id': 3}
    assert json.loads((bare / 'config.json').read_text())['max_position_embeddings'] == 48


def test_tokenizer_files_and_model_card_go_along(tmp_path):
    tokenizer = tmp_path / 'tokenizer'
    tokenizer.mkdir()
    (tokenizer / 'tokenizer.json').write_text('{"a": 1}')
    (tokenizer / 'generation_config.json').write_text('{"temperature": 0.6}')
    (tokenizer / 'notes.txt').write_text('not a tokenizer file')
    card = {'parent': 'someone/parent', 'budget': 'small', 'metrics': {'bits_per_byte': 1.2345}}
    out = export(tmp_path / 'out', random_params(LLAMA), LLAMA, tokenizer_folder=tokenizer, card=card)
    assert (out / 'tokenizer.json').read_text() == '{"a": 1}'
    assert json.loads((out / 'generation_config.json').read_text()) == {'temperature': 0.6}
    assert not (out / 'notes.txt').exists()
    text = (out / 'README.md').read_text()
    count = sum(leaf.size for leaf in jax.tree.leaves(random_params(LLAMA)))
    for fact in ('base_model: someone/parent', '| budget | small |', f'{count:,}', '| mlp | 48 |', '| bits_per_byte | 1.2345 |'):
        assert fact in text


def test_heterogeneous_slice_offers_the_nearest_it_can_hold(tmp_path):
    arch = HYBRID.narrow({'experts@1': 4, 'experts@4': 6, 'expert_width@1': 8, 'layers': 5})
    params = random_params(HYBRID)
    with pytest.raises(UserError, match='differs by layer') as raised:
        export(tmp_path / 'out', slice_params(params, HYBRID, arch), arch)
    assert not list(tmp_path.iterdir())
    nearest = HYBRID.narrow(parse_widths(str(raised.value).split('--widths ')[1]))
    export(tmp_path / 'out', slice_params(params, HYBRID, nearest), nearest)
    assert nearest.mixers[1].experts == nearest.mixers[4].experts in (4, 6)


def test_llama_slice_that_transformers_refuses_offers_the_nearest(tmp_path):
    arch = LLAMA.narrow(embed=22)
    with pytest.raises(UserError, match='--widths') as raised:
        export(tmp_path / 'out', slice_params(random_params(LLAMA), LLAMA, arch), arch)
    nearest = LLAMA.narrow(parse_widths(str(raised.value).split('--widths ')[1]))
    assert nearest.embed == 20
    load_model(export(tmp_path / 'out', slice_params(random_params(LLAMA), LLAMA, nearest), nearest))


ROTARY = Attention(kv_heads=1, query_heads=1, head_dim=8, rope=Rope())
UNHOLDABLE = {
    'rotary hybrid': (Arch.from_pattern('M*', vocab=8, embed=8, mamba=HYBRID.mixers[0], attention=ROTARY), 'llama'),
    'relu2 llama': (Arch.from_pattern('*-', vocab=8, embed=8, attention=ROTARY, mlp=MLP(8), unit_blocks=2), 'swiglu'),
    'swiglu hybrid': (Arch.from_pattern('M-', vocab=8, embed=8, mamba=HYBRID.mixers[0], mlp=MLP(8, 'swiglu')), 'relu2'),
}


@pytest.mark.parametrize('name', UNHOLDABLE)
def test_model_that_no_family_holds_is_refused_with_the_reason(name, tmp_path):
    arch, reason = UNHOLDABLE[name]
    with pytest.raises(UserError, match=reason):
        export(tmp_path / 'out', random_params(arch), arch)


def test_export_never_overwrites_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    params = random_params(LLAMA)
    (tmp_path / 'out').mkdir()
    monkeypatch.chdir(tmp_path / 'out')
    out = export('.', params, LLAMA)
    assert out == tmp_path / 'out'
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match='not an empty folder'):
        export(out, params, LLAMA)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(group: str, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name == 'down':
            raise OSError(28, 'No space left on device')
        return params[group][name][index]

    with pytest.raises(WorkError, match='no space is left'):
        export_folder(tmp_path / 'second', LLAMA, full_disk)
    assert [path.name for path in tmp_path.iterdir()] == ['out']
