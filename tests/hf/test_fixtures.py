"""The parity of every family where transformers is not installed: committed models and the logits it gave for them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from elastic_jax.hf.export import export_folder
from elastic_jax.hf.families import FAMILIES
from elastic_jax.hf.folder import read_arch
from elastic_jax.hf.safetensors import SafetensorsFile
from tests.hf.ours import FIXTURES, TOKENS_2x37, assert_close, load_params, our_logits


@pytest.mark.parametrize('family', FAMILIES)
def test_committed_model_gives_the_committed_logits(family):
    folder = FIXTURES / family
    assert_close(our_logits(load_params(folder), read_arch(folder), TOKENS_2x37), np.load(folder / 'logits.npy'))


@pytest.mark.parametrize('family', FAMILIES)
def test_export_writes_the_tensors_that_transformers_wrote(family, tmp_path):
    folder, params = FIXTURES / family, load_params(FIXTURES / family)
    config = json.loads((folder / 'config.json').read_text())
    read = lambda group, name, index: params[group][name][index]
    out = export_folder(tmp_path / 'out', read_arch(folder), read, dtype='float32', hf_config=config)
    theirs, ours = SafetensorsFile(folder / 'model.safetensors'), SafetensorsFile(out / 'model.safetensors')
    assert theirs.tensors.keys() == ours.tensors.keys()
    for name, info in theirs.tensors.items():
        assert ours.tensors[name].shape == info.shape and ours.read(name).tobytes() == theirs.read(name).tobytes(), name
    written = json.loads((out / 'config.json').read_text())
    kept = {key for key in config if key in written}
    assert {key: written[key] for key in kept} == {key: config[key] for key in kept}
