"""A masked norm is the sliced norm when eps is scaled by the share that is kept and the result by its root (method.md §2)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.model.norm import rms_norm


@pytest.mark.parametrize('eps', [1e-5, 0.3])
@pytest.mark.parametrize('kept', [1, 5, 12])
def test_the_masked_norm_is_the_sliced_one(kept, eps):
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 3, 12)), rng.normal(size=12)
    masked = x * (np.arange(12) < kept)
    with jax.enable_x64(True):
        found = rms_norm(jnp.asarray(masked), jnp.asarray(scale), eps, kept / 12)
        sliced = rms_norm(jnp.asarray(x[..., :kept]), jnp.asarray(scale[:kept]), eps)
    assert sliced.dtype == jnp.float64
    expected = scale[:kept] * x[..., :kept] / np.sqrt((x[..., :kept] ** 2).mean(-1, keepdims=True) + eps)
    np.testing.assert_allclose(sliced, expected, rtol=1e-12)
    np.testing.assert_allclose(found[..., :kept], expected, rtol=1e-12)
    np.testing.assert_array_equal(found[..., kept:], 0.0)


def test_a_norm_over_two_dimensions_and_in_low_precision():
    x, scale = np.random.default_rng(1).normal(size=(2, 3, 4)), np.ones((3, 4))
    expected = x / np.sqrt((x**2).mean((-2, -1), keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5, axes=(-2, -1)), expected, rtol=1e-5)
    low = rms_norm(jnp.asarray(1e3 * x, jnp.bfloat16), jnp.asarray(scale), 1e-5, axes=(-2, -1))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), expected, rtol=0.02, atol=1e-3)
