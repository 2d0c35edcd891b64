"""Imported models give transformers' logits: the first outside oracle of the model code."""

from __future__ import annotations

import numpy as np
import pytest

from elastic_jax.hf.folder import read_arch
from tests.hf.oracle import CASES, TOKENS_2x37, assert_close, load_params, make_model, our_logits, torch_logits


@pytest.mark.parametrize('case', CASES)
def test_imported_model_gives_the_logits_of_transformers(case, tmp_path):
    model = make_model(case, tmp_path)
    arch, params = read_arch(tmp_path), load_params(tmp_path)
    mask_BxT = np.ones_like(TOKENS_2x37)
    mask_BxT[0, :9] = 0  # padding on the left of the first row
    ours, theirs = our_logits(params, arch, TOKENS_2x37, mask_BxT), torch_logits(model, TOKENS_2x37, mask_BxT)
    assert_close(ours[mask_BxT == 1], theirs[mask_BxT == 1])
