"""Scoring sizes under masks: the scores of the slices, from one compiled program for all of them."""

import pytest

from elastic_jax.arch import MLP, Arch
from elastic_jax.evaluate.masked import _summed_loss, evaluate_masked
from elastic_jax.evaluate.perplexity import evaluate
from elastic_jax.layout import Layout
from elastic_jax.nest.slice import slice_params
from tests.evaluate.test_perplexity import DENSE, random_batches, sharp_params

BLOCKED = Layout(mlp=2)
PARENT = Arch.from_pattern('--', vocab=DENSE.vocab, embed=DENSE.embed, mlp=MLP(width=32))


def test_scores_are_those_of_the_slices_and_nothing_is_compiled_again():
    params, batches = sharp_params(PARENT, BLOCKED), random_batches(2)
    before = _summed_loss._cache_size()
    scores = []
    for child in (PARENT.narrow({'embed': 12, 'mlp@1': 20}), PARENT.narrow({'mlp': 16, 'layers': 1}), PARENT):
        scores.append(evaluate_masked(params, PARENT, child, batches, BLOCKED))
        sliced = evaluate(slice_params(params, PARENT, child, BLOCKED), child, batches)
        assert scores[-1] == pytest.approx(sliced, rel=1e-4)
    assert _summed_loss._cache_size() == before + 1
    assert len({round(score['loss'], 3) for score in scores}) == 3
