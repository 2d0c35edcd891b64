"""What tokens are drawn from, against the definitions in plain numpy, and that draws follow it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.errors import UserError
from elastic_jax.infer.sampling import Sampling, draw, entropy, knobs_of, next_token_logits, token_probabilities

DRAWS = 20000
# The 99.99 % quantile of chi-square by degrees of freedom: a right sampler is red once in ten thousand, with fixed seeds never.
CHI_SQUARE = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7}


def expected(logits, seen, sampling):
    """The distribution by definition: penalty, temperature, the top k, then the smallest set whose mass reaches top_p."""
    logits = np.asarray(logits, np.float64).copy()
    for token in np.flatnonzero(seen):
        logits[token] = (
            logits[token] / sampling.repetition_penalty if logits[token] > 0 else logits[token] * sampling.repetition_penalty
        )
    if sampling.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    weights = np.exp(logits / sampling.temperature)
    order = np.argsort(-weights)
    kept = list(order[: sampling.top_k or None])
    mass, chosen = 0.0, []
    for token in kept:
        if mass < sampling.top_p:
            chosen.append(token)
        mass += weights[token] / weights[kept].sum()
    result = np.zeros(len(logits))
    result[chosen] = weights[chosen] / weights[chosen].sum()
    return result


CASES = [
    Sampling(),
    Sampling(repetition_penalty=3.0),
    Sampling(1.0),
    Sampling(0.5),
    Sampling(2.0, top_k=3),
    Sampling(1.0, top_k=99),
    Sampling(1.0, top_p=0.6),
    Sampling(1.3, top_k=5, top_p=0.7, repetition_penalty=1.7),
    Sampling(1.0, top_k=2, top_p=0.999),
    Sampling(1.0, top_p=1e-6),
    Sampling(1.0, top_p=1e-50),
    Sampling(1.0, top_k=10**20),
    Sampling(repetition_penalty=1e-300),
    Sampling(1.0, repetition_penalty=1e300),
    Sampling(float('inf')),
]


def test_the_strongest_penalty_and_the_coldest_temperature_stay_finite():
    for penalty in (1e-300, 1e300):
        knobs = knobs_of([Sampling(1e-40, repetition_penalty=penalty)])
        assert np.isfinite(next_token_logits(np.asarray([[0.5, -9.0, 9.0, 2.0]]), np.ones((1, 4), bool), knobs)).all()


def test_the_coldest_temperature_is_greedy():
    probabilities = token_probabilities(np.asarray([[0.5, -1.0, 3.0, 2.0]]), np.zeros((1, 4), bool), knobs_of([Sampling(1e-40)]))
    np.testing.assert_array_equal(probabilities, [[0, 0, 1, 0]])


def test_every_row_has_the_distribution_that_it_asked_for():
    """All cases as rows of one batch: no row's settings touch another's."""
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(0, 2, (len(CASES), 8)).astype(np.float32), rng.random((len(CASES), 8)) < 0.4
    found = jax.jit(token_probabilities)(logits, seen, knobs_of(CASES))
    for row, sampling in enumerate(CASES):
        np.testing.assert_allclose(found[row], expected(logits[row], seen[row], sampling), atol=1e-6, err_msg=str(sampling))


@pytest.mark.parametrize('sampling', [Sampling(1.0), Sampling(0.6, top_k=3), Sampling(1.5, top_p=0.8, repetition_penalty=2.0)])
def test_draws_follow_the_distribution(sampling):
    logits, seen = np.array([1.0, 0.2, -0.5, 2.0, 0.9, -1.0], np.float32), np.array([0, 1, 0, 1, 0, 0], bool)
    keys = jax.vmap(jax.random.key)(jnp.arange(DRAWS))
    tokens = draw(jnp.broadcast_to(logits, (DRAWS, 6)), jnp.broadcast_to(seen, (DRAWS, 6)), keys, knobs_of([sampling] * DRAWS))
    want = expected(logits, seen, sampling) * DRAWS
    counts = np.bincount(tokens, minlength=6)
    assert counts[want == 0].sum() == 0
    possible = want > 0
    statistic = ((counts - want)[possible] ** 2 / want[possible]).sum()
    assert statistic < CHI_SQUARE[possible.sum() - 1]


def test_entropy_is_in_nats():
    found = entropy(jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-30, 1e-30], [1.0, 1e-30, 1e-30, 1e-30]])))
    np.testing.assert_allclose(found, [np.log(4), np.log(2), 0], atol=1e-6)


def test_a_large_top_k_and_equal_logits_cut_nothing():
    knobs = knobs_of([Sampling(1.0, top_k=2**40), Sampling(1.0, top_k=2)])
    logits = jnp.zeros((2, 5))
    np.testing.assert_array_equal(next_token_logits(logits, jnp.zeros((2, 5), bool), knobs), logits)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'temperature': -1}, 'temperature=-1 must be at least 0'),
        ({'top_k': -2}, 'top_k=-2 must be at least 0'),
        ({'top_p': 0}, 'top_p=0 must be above 0 and at most 1'),
        ({'repetition_penalty': 0}, 'repetition_penalty=0 must be above 0'),
        ({'temperature': float('nan')}, 'temperature=nan must be at least 0'),
    ],
)
def test_settings_out_of_bounds_are_one_sentence(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
