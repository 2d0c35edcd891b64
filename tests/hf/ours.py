"""Our side of the comparison; needs neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from elastic_jax.arch import Arch
from elastic_jax.hf.importing import import_params
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.decoder import logits

TOLERANCE = 2e-5  # of the largest |logit|
FIXTURES = Path(__file__).parent / 'fixtures'
TOKENS_2x37 = np.random.default_rng(7).integers(0, 64, (2, 37))


def assert_close(ours: Any, theirs: np.ndarray, tolerance: float = TOLERANCE) -> None:
    difference = np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()
    assert difference <= tolerance, f'{difference:.2e} of the largest logit, allowed {tolerance:.0e}'


def load_params(folder: Path, layout: Layout = FLAT) -> dict:
    params: dict = {}
    for group, name, leaf in import_params(folder, layout):
        params.setdefault(group, {})[name] = leaf
    return params


def our_logits(params: dict, arch: Arch, tokens_BxT: np.ndarray, segment_ids_BxT: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(_logits(params, tokens_BxT, segment_ids_BxT, arch))


_logits = jax.jit(lambda params, tokens, segments, arch: logits(params, tokens, arch, segments), static_argnames='arch')
