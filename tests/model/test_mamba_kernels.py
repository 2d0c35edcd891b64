"""The kernels around the state-space recurrence, interpreted: against float64, and their gradients against autodiff's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.model.conv import causal_conv
from elastic_jax.model.conv_kernel import conv_silu_by_kernel, fits_conv_kernel
from elastic_jax.model.gated_norm_kernel import fits_gated_norm_kernel, gated_norm_by_kernel
from elastic_jax.model.norm import rms_norm

EPS = 1e-3


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def silu(z):
    return z / (1 + np.exp(-z))


def documents(length, longest=40):
    """Of two sequences: ids that come again, and one document."""
    rng = np.random.default_rng(1)
    ids = np.repeat(np.arange(length) % 3, rng.integers(1, longest, length))[:length]
    return np.stack([ids, np.zeros(length, ids.dtype)]).astype(np.int32)


# One tile; three tiles of tokens and two of channels, by a kernel of two taps; more taps than a group of rows that move together.
@pytest.mark.parametrize('length, channels, taps', [(128, (2, 64), 4), (384, (1, 2, 128), 2), (256, (128,), 7)])
@pytest.mark.parametrize(('packed', 'users'), [(True, 2), (False, 1)])
def test_the_convolution_sees_its_own_document(length, channels, taps, packed, users):
    """Its gradient is that of all its users' together."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    u, kernel, bias = draw(2, length, *channels), draw(taps, *channels), draw(*channels)
    weights = tuple(draw(2, length, *channels) for _ in range(users))
    assert fits_conv_kernel(u.shape, taps)
    ids = documents(length) if packed else None
    expected = np.zeros(u.shape) + bias.astype(np.float64) * packed
    for b, t, s in np.ndindex(2, length, taps):
        if t >= s and (ids is None or ids[b, t - s] == ids[b, t]):
            expected[b, t] += kernel[taps - 1 - s].astype(np.float64) * u[b, t - s]
    given = (u, kernel, bias) if packed else (u, kernel)
    form = lambda u, kernel, bias=None: conv_silu_by_kernel(u, kernel, bias, ids, users, interpret=True)
    found, backward = jax.vjp(form, *given)
    assert len(found) == users
    for own in found:
        close(own, silu(expected))
    plain = lambda u, kernel, bias=None: jax.nn.silu(causal_conv(u, kernel, bias, ids, None))
    jax.tree.map(close, backward(weights), jax.vjp(plain, *given)[1](sum(weights)))


# Groups of whole columns; of three and a half, so that two share one; several in a column; all groups in one tile.
@pytest.mark.parametrize('groups, heads, channels', [(4, 2, 64), (4, 7, 64), (8, 1, 32), (3, 2, 128)])
def test_the_norm_is_that_of_each_group(groups, heads, channels):
    shape = (2, 256, groups, heads, channels)
    assert fits_gated_norm_kernel(shape)
    rng = np.random.default_rng(0)
    y, x, z, weight = rng.standard_normal((4, *shape)).astype(np.float32)
    d, scale = rng.standard_normal(shape[2:4]).astype(np.float32), rng.standard_normal(shape[2:]).astype(np.float32)
    gated = (y.astype(np.float64) + d[..., None] * x) * silu(z.astype(np.float64))
    expected = scale * gated / np.sqrt(np.mean(gated**2, axis=(-2, -1), keepdims=True) + EPS)
    found, backward = jax.vjp(lambda *given: gated_norm_by_kernel(*given, EPS, interpret=True), y, x, z, d, scale)
    close(found, expected)

    def plain(y, x, z, d, scale):
        return rms_norm((y + d[None, None, ..., None] * x) * jax.nn.silu(z), scale, EPS, axes=(-2, -1))

    jax.tree.map(close, backward(weight), jax.vjp(plain, y, x, z, d, scale)[1](weight))


def test_in_bfloat16_only_the_result_is_rounded():
    rng = np.random.default_rng(0)
    half = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    u, kernel = half(1, 128, 128), half(4, 128)
    exact = jax.nn.silu(causal_conv(u.astype(jnp.float32), kernel.astype(jnp.float32), None, None, None))
    (found,) = conv_silu_by_kernel(u, kernel, None, None, interpret=True)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_what_is_no_whole_tile_has_no_kernel():
    assert not fits_conv_kernel((1, 100, 128), 4) and not fits_conv_kernel((1, 128, 2, 60), 4)
    assert not fits_conv_kernel((1, 128, 128), 9)
    assert not fits_gated_norm_kernel((1, 100, 2, 2, 64)) and not fits_gated_norm_kernel((1, 128, 2, 1, 60))
    assert not fits_gated_norm_kernel((1, 128, 2, 64, 64))  # a group of 4096 channels finds no room
