"""The kernels of the state-space recurrence, interpreted: against the loop in float64, and the mixer by either form."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.arch import Arch, Mamba
from elastic_jax.model.context import context_for
from elastic_jax.model.kernels import ANYWHERE, Target
from elastic_jax.model.mamba import mamba
from elastic_jax.model.ssd import ssd
from elastic_jax.model.ssd_blocks import CHUNK, fits_ssd_kernel
from elastic_jax.model.ssd_kernel import ssd_by_kernel
from tests.model import oracle
from tests.tiny import numpy_params

# (groups, heads of a group, channels, state). A unit holds two heads of 64 channels, here of two groups; one head of 256;
# four heads of 32, or two of them at the end. The last has units of one group and of two.
SHAPES = [(2, 1, 64, 128), (1, 1, 256, 128), (1, 6, 32, 128), pytest.param((2, 3, 64, 128), marks=pytest.mark.slow)]


def draw(shape, length, seed=0):
    """(x, dt, a, b, c), documents of 3 to 60 tokens, and a weight for y: two sequences, the second one document."""
    g, m, p, n = shape
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(2, 2, length, g, m, p)).astype(np.float32)
    b, c = rng.normal(size=(2, 2, length, g, n)).astype(np.float32) / np.float32(n**0.5)
    # Small steps: a chunk leaves about a quarter of the state it began with.
    dt = rng.uniform(0, 0.02, size=(2, length, g, m)).astype(np.float32)
    a = -rng.uniform(0.1, 2, size=(g, m)).astype(np.float32)
    ids = np.repeat(np.arange(40) % 7, rng.integers(3, 60, 40))[:length]
    return (x, dt, a, b, c), np.stack([ids, np.zeros(length, ids.dtype)]).astype(np.int32), weight


def loop(inputs, ids):
    x, dt, a, b, c = (np.asarray(u, np.float64) for u in inputs)
    y = np.zeros(x.shape)
    for i, g, m in np.ndindex(x.shape[0], *x.shape[2:4]):
        edges = [0, *(np.flatnonzero(np.diff(ids[i])) + 1), x.shape[1]]
        for start, end in itertools.pairwise(edges):
            span = slice(start, end)
            state = np.zeros((x.shape[-1], b.shape[-1]))
            own = x[i, span, g, m], dt[i, span, g, m], a[g, m], b[i, span, g], c[i, span, g]
            y[i, span, g, m] = oracle.recurrence(*own, state)[0]
    return y


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_the_kernel_is_the_recurrence_and_its_gradients_are_those_of_the_loop(shape):
    """Three chunks, the last padded; several boundaries in a chunk, ids that come again, and a state carried past two chunks."""
    inputs, ids, weight = draw(shape, 2 * CHUNK + 40)
    assert len(np.flatnonzero(np.diff(ids[0, :CHUNK]))) > 1

    @jax.jit
    def run(*inputs):
        y, backward = jax.vjp(lambda *inputs: ssd_by_kernel(*inputs, ids, interpret=True), *inputs)
        return y, backward(weight)

    y, gradients = run(*inputs)
    expected = loop(inputs, ids)
    np.testing.assert_allclose(y, expected, atol=3e-6 * np.abs(expected).max())
    # Along a direction for each input alone the derivative is the difference of the loop's values.
    direction, _, _ = draw(shape, 2 * CHUNK + 40, seed=1)
    for n, gradient in enumerate(gradients):
        moved = lambda sign, n=n: [u + sign * 1e-5 * np.float64(direction[n]) if k == n else u for k, u in enumerate(inputs)]
        along = ((loop(moved(1), ids) - loop(moved(-1), ids)) * weight).sum() / 2e-5
        # That of a is a sum over tokens, of terms as large as those of dt.
        size = np.linalg.norm(gradients[1] * inputs[1] if n == 2 else gradient * direction[n])
        np.testing.assert_allclose(np.vdot(np.float64(gradient), direction[n]), along, atol=2e-5 * size)


def test_in_bfloat16_the_gradient_of_the_decay_survives_decays_that_leave_nothing():
    """What l gains at one token it loses at the next: summed rounded over a chunk, it would be four times too large here."""
    (x, _, _, b, c), ids, weight = draw((1, 2, 64, 128), 2 * CHUNK)
    rng = np.random.default_rng(2)
    dt = np.exp(rng.uniform(np.log(1e-3), np.log(2), size=x.shape[:-1])).astype(np.float32)
    a = -rng.uniform(0.5, 16, size=x.shape[2:4]).astype(np.float32)
    x, b, c = (jnp.asarray(u, jnp.bfloat16) for u in (x, b, c))
    gradient = jax.jit(lambda a: jax.vjp(lambda a: ssd_by_kernel(x, dt, a, b, c, ids, interpret=True), a)[1](weight)[0])(a)
    for m in range(2):
        moved = lambda sign, m=m: np.float64(a) * (1 + sign * 1e-5 * (np.arange(2) == m))
        along = ((loop((x, dt, moved(1), b, c), ids) - loop((x, dt, moved(-1), b, c), ids)) * weight).sum() / 2e-5
        np.testing.assert_allclose(gradient[0, m] * a[0, m], along, rtol=0.05)


def test_all_gradients_are_those_of_the_plain_form_without_documents():
    inputs, _, weight = draw((2, 1, 64, 128), 150)
    run = lambda form: jax.jit(lambda *inputs: jax.vjp(form, *inputs)[1](weight))(*inputs)
    found = run(lambda *inputs: ssd_by_kernel(*inputs, None, interpret=True))
    for mine, plain in zip(found, run(lambda *inputs: ssd(*inputs, None, 64)[0]), strict=True):
        np.testing.assert_allclose(mine, plain, atol=1e-5 * np.abs(plain).max())


def test_the_mixer_is_the_same_by_either_form():
    mixer = Mamba(heads=4, head_dim=32, groups=2, state=128, chunk=32)
    layer = numpy_params(Arch.from_pattern('M', vocab=4, embed=6, mamba=mixer))['layer_000']
    x = np.random.default_rng(4).normal(size=(1, CHUNK + 9, 6)).astype(np.float32)
    ids = np.repeat([1, 2, 3], [60, 30, CHUNK - 81])[None]
    context = context_for(ids, ids)

    def run(target):
        own = dataclasses.replace(context, target=target)
        program = jax.jit(lambda layer, x: mamba(layer, x, mixer, own, None).y_BxTxD).lower(layer, x)
        return program.as_text(debug_info=True), program.compile()(layer, x)

    (plain, expected), (by_kernel, found) = run(ANYWHERE), run(Target(kernels=True))
    assert 'ssd_forward' in by_kernel and 'ssd_forward' not in plain and 'ssd_forward' not in run(Target('cpu'))[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_shapes_that_tiles_do_not_hold_are_left_to_xla():
    published = (1, 8192, 8, 8, 64)
    assert fits_ssd_kernel(published, 128) and fits_ssd_kernel((1, 8192, 8, 7, 64), 128)
    assert not fits_ssd_kernel(published, 64)
    for shape in ((1, CHUNK - 1, 8, 8, 64), (1, 8192, 8, 16, 80), (1, 8192, 1, 80, 64)):
        assert not fits_ssd_kernel(shape, 128)
