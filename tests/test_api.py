"""The face for Python, on a checkpoint whose parameters are known: every answer is compared with one found without it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elastic_jax
from elastic_jax.checkpoint.manager import CheckpointManager
from elastic_jax.checkpoint.manifest import Budget, Manifest
from elastic_jax.cost import cost_of
from elastic_jax.errors import UserError
from elastic_jax.hf.importing import import_params
from elastic_jax.layout import Layout
from elastic_jax.model import decoder
from elastic_jax.nest.slice import slice_params
from elastic_jax.parallel.mesh import make_mesh
from tests.tiny import HYBRID, numpy_params

ARCH = dataclasses.replace(HYBRID, vocab=264)  # room for bytes
LAYOUT = Layout(mlp=2, experts=2)
BUDGETS = {
    'full': ARCH,
    'mid': ARCH.narrow({'embed': 24, 'mlp': 32, 'experts': 6}),
    'small': ARCH.narrow({'embed': 16, 'mlp@3': 16, 'mamba_heads': 4, 'layers': 4}),
}
TOKENS_2x12 = np.random.default_rng(1).integers(0, 256, (2, 12))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp('run')
    budgets = {name: Budget(arch, cost_of(arch).to_json(), {'bits_per_byte': 2.5}) for name, arch in BUDGETS.items()}
    manifest = Manifest(
        arch=ARCH, layout=LAYOUT, budgets=budgets, step=7, stage='long', stage_step=7, rng=[0], dtypes={'params': 'float32'},
        tokenizer={'kind': 'bytes'}, hf_config=None, data_fingerprint='', ordering_hash='', experiment='test',
    )  # fmt: skip
    manager = CheckpointManager(path)
    manager.save(7, params=numpy_params(ARCH, LAYOUT), opt_state={}, router={}, ordering={}, data={}, manifest=manifest)
    manager.close()
    return path


@pytest.fixture(scope='module')
def checkpoint(workdir):
    return elastic_jax.open_checkpoint(workdir)


def expected_params(arch):
    return slice_params(numpy_params(ARCH, LAYOUT), ARCH, arch, LAYOUT)


def expected_logits(arch, tokens_BxT):
    run = jax.jit(lambda params, tokens: decoder.logits(params, tokens, arch))
    return np.asarray(run(expected_params(arch), tokens_BxT))


def test_a_workdir_and_one_of_its_steps_open_the_same_checkpoint(workdir, checkpoint):
    step = elastic_jax.open_checkpoint(workdir / 'checkpoints' / '7')
    assert repr(step) == repr(checkpoint) and checkpoint.manifest.step == 7


def test_the_table_of_budgets_counts_what_there_is(checkpoint):
    assert list(checkpoint.budgets) == ['full', 'mid', 'small'] and checkpoint.largest == 'full'
    lines, page = repr(checkpoint.budgets).splitlines(), checkpoint.budgets._repr_html_()
    table, widths = lines[:4], [line.split() for line in lines[5:] if not line.startswith(' ')]
    assert max(map(len, lines)) <= 80 and page.count('<tr>') == 4
    for line, (own, first), (name, arch) in zip(table[1:], widths, BUDGETS.items(), strict=True):
        count = sum(leaf.size for leaf in jax.tree.leaves(expected_params(arch)))
        assert checkpoint.budgets[name].costs['parameters'] == count
        assert checkpoint.budgets[name].arch.widths()['embed'] == arch.embed
        for fact in (name, '2.5000'):
            assert fact in line and fact in page
        assert own == name and first.startswith(f'embed={arch.embed},') and f'embed={arch.embed}' in page
    described = checkpoint.describe()
    assert json.loads(json.dumps(described)) == described
    assert [budget['name'] for budget in described['budgets']] == list(BUDGETS)


@pytest.mark.parametrize('name', BUDGETS)
def test_a_budget_gives_the_logits_and_loss_of_its_slice(checkpoint, name):
    model = checkpoint.load(name)
    jax.tree.map(np.testing.assert_array_equal, model.params, expected_params(BUDGETS[name]))
    logits = expected_logits(BUDGETS[name], TOKENS_2x12)
    np.testing.assert_allclose(model.logits(TOKENS_2x12), logits, rtol=1e-5, atol=1e-5)
    exact = logits[:, :-1].astype(np.float64)
    chosen = np.take_along_axis(exact, TOKENS_2x12[:, 1:, None], axis=-1)[..., 0]
    assert model.loss(TOKENS_2x12) == pytest.approx((np.log(np.exp(exact).sum(-1)) - chosen).mean(), rel=1e-5)


def test_widths_that_no_budget_has_are_sizes_too(checkpoint):
    model, arch = checkpoint.load(widths={'embed': 20, 'mlp': 24}), ARCH.narrow({'embed': 20, 'mlp': 24})
    assert model.arch == arch
    np.testing.assert_allclose(model.logits(TOKENS_2x12), expected_logits(arch, TOKENS_2x12), rtol=1e-5, atol=1e-5)


def test_half_precision_and_a_mesh_change_where_and_how_numbers_are_kept_not_which(checkpoint):
    half = checkpoint.load('mid', dtype=jnp.bfloat16).params
    wanted = expected_params(BUDGETS['mid'])
    np.testing.assert_array_equal(half['layer_003']['up'], wanted['layer_003']['up'].astype(jnp.bfloat16))
    assert half['layer_000']['a_log'].dtype == np.float32
    mesh = make_mesh({'fsdp': 1})
    meshed = checkpoint.load('mid', mesh=mesh).params
    jax.tree.map(np.testing.assert_array_equal, meshed, wanted)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(meshed))


def test_greedy_text_is_the_likeliest_byte_after_byte(checkpoint):
    prompt, new = b'def f(', 8
    tokens = list(prompt)
    for _ in range(new):
        padded = np.pad([tokens], ((0, 0), (0, len(prompt) + new - len(tokens))))  # one shape, one compile
        tokens.append(int(expected_logits(BUDGETS['small'], padded)[0, len(tokens) - 1].argmax()))
    # 256 ends a document, and what is no byte is not shown.
    new_bytes = tokens[len(prompt) :]
    new_bytes = new_bytes[: new_bytes.index(256)] if 256 in new_bytes else new_bytes
    model = checkpoint.load('small')
    text = bytes(byte for byte in new_bytes if byte < 256).decode(errors='replace')
    assert model.generate('def f(', max_tokens=new) == text
    assert model.generate(['def f(', 'x'], max_tokens=new)[0] == text
    assert ''.join(model.stream('def f(', max_tokens=new)) == text


def test_an_export_holds_the_parameters_of_the_slice(checkpoint, tmp_path):
    out = checkpoint.export('mid', tmp_path / 'out')
    config, card = json.loads((out / 'config.json').read_text()), (out / 'README.md').read_text()
    assert config['hidden_size'] == 24 and config['n_routed_experts'] == 6 and config['eos_token_id'] == 256
    assert '| budget | mid |' in card and '| bits_per_byte | 2.5 |' in card
    wanted = expected_params(BUDGETS['mid'])
    for group, name, leaf in import_params(out, LAYOUT):
        np.testing.assert_array_equal(leaf, wanted[group][name])


def test_a_slice_is_a_checkpoint_of_its_own(checkpoint, tmp_path):
    cut = elastic_jax.open_checkpoint(checkpoint.slice('small', tmp_path / 'cut'))
    assert list(cut.budgets) == ['full'] and cut.arch == BUDGETS['small'] and cut.layout == LAYOUT
    assert cut.budgets['full'].metrics == {'bits_per_byte': 2.5}
    jax.tree.map(np.testing.assert_array_equal, cut.load('full').params, expected_params(BUDGETS['small']))
    narrower = elastic_jax.open_checkpoint(cut.slice(None, tmp_path / 'again', widths={'embed': 8}))
    wanted = expected_params(BUDGETS['small'].narrow({'embed': 8}))
    jax.tree.map(np.testing.assert_array_equal, narrower.load('full').params, wanted)


def test_a_file_is_scored_as_the_run_reads_its_own_or_as_is_said(checkpoint, workdir, tmp_path):
    chats = tmp_path / 'chats.jsonl'
    chats.write_text(json.dumps({'messages': [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'}]}))
    with pytest.raises(UserError, match=r"chats\.jsonl:1 has no field 'text'"):
        checkpoint.heldout(str(chats))
    (said,) = checkpoint.heldout(str(chats), field='messages', loss='answers')
    shutil.copytree(workdir, tmp_path / 'run')
    (tmp_path / 'run' / 'config.json').write_text(json.dumps({'data': {'field': 'messages', 'loss': 'answers'}}))
    (as_run,) = elastic_jax.open_checkpoint(tmp_path / 'run').heldout(str(chats))
    np.testing.assert_array_equal(said['loss_mask'], as_run['loss_mask'])
    assert said['loss_mask'].sum() == len('yo<|im_end|>') + 1


MISTAKES = {
    'unknown budget': (lambda checkpoint: checkpoint.load('smal'), "'smal'.*did you mean 'small'"),
    'unknown axis': (lambda checkpoint: checkpoint.load(widths={'embd': 8}), 'embd'),
    'larger than the parent': (lambda checkpoint: checkpoint.load(widths={'embed': 64}), 'embed=64'),
    'against the layout': (lambda checkpoint: checkpoint.load(widths={'mlp': 33}), "multiple of the layout's G=2; take 32 or 34"),
    'neither': (lambda checkpoint: checkpoint.load(), 'name a budget or give widths'),
    'both': (lambda checkpoint: checkpoint.load('mid', widths={'embed': 8}), 'one of the two'),
    'taken folder': (lambda checkpoint: checkpoint.slice('mid', checkpoint.path), 'exists already'),
    'no run beside it': (lambda checkpoint: checkpoint.evaluate(['mid']), 'give a file with --data'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_sentence_that_names_it(checkpoint, mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message) as raised:
        call(checkpoint)
    assert '\n' not in str(raised.value)


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        elastic_jax.open_checkpoint(tmp_path / 'none')
    with pytest.raises(UserError, match='has no checkpoints'):
        elastic_jax.open_checkpoint(tmp_path)
