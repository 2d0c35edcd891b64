"""The GPU's kernels of the state-space recurrence, interpreted: against the loop in float64, and lowered for a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.arch import Arch, Mamba
from elastic_jax.model.context import context_for
from elastic_jax.model.kernels import Target
from elastic_jax.model.mamba import mamba
from elastic_jax.model.ssd import ssd
from elastic_jax.model.ssd_triton import CHUNK, HEADS, fits_ssd_triton, ssd_by_triton
from tests.model import cuda
from tests.model.gradients import both_ways
from tests.model.test_ssd_kernel import draw, loop
from tests.tiny import numpy_params

# (groups, heads of a group, channels, state): states and channels of one block and of two; a group of two programs.
SHAPES = [(2, 1, 128, 128), (1, 3, 64, 32), (1, 7, 16, 16), (1, HEADS + 2, 16, 16)]
LENGTH = 2 * CHUNK + 40  # three chunks, the last padded


def documents():
    """Several in a chunk, one that begins with a chunk, one that ends past the next, an id that comes again; one alone."""
    ids = np.repeat([0, 1, 2, 3, 0], [10, 30, CHUNK - 40, CHUNK + 9, LENGTH - 2 * CHUNK - 9])
    return np.stack([ids, np.zeros_like(ids)]).astype(np.int32)


@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_the_kernels_are_the_recurrence_and_their_gradients_are_those_of_the_loop(shape):
    inputs, _, weight = draw(shape, LENGTH)
    ids = documents()
    assert fits_ssd_triton(inputs[0].shape, shape[-1])
    y, *gradients = both_ways(lambda *inputs: ssd_by_triton(*inputs, ids, interpret=True), weight, *inputs)
    expected = loop(inputs, ids)
    np.testing.assert_allclose(y, expected, atol=3e-6 * np.abs(expected).max())
    # Along a direction for each input alone the derivative is the difference of the loop's values.
    direction, _, _ = draw(shape, LENGTH, seed=1)
    for n, gradient in enumerate(gradients):
        moved = lambda sign, n=n: [u + sign * 1e-5 * np.float64(direction[n]) if k == n else u for k, u in enumerate(inputs)]
        along = ((loop(moved(1), ids) - loop(moved(-1), ids)) * weight).sum() / 2e-5
        # That of a is a sum over tokens, of terms as large as those of dt.
        size = np.linalg.norm(gradients[1] * inputs[1] if n == 2 else gradient * direction[n])
        np.testing.assert_allclose(np.vdot(np.float64(gradient), direction[n]), along, atol=2e-5 * size)


@pytest.mark.parametrize('packed', [True, False])
def test_every_gradient_is_that_of_the_plain_form(packed):
    inputs, _, weight = draw((2, 3, 16, 32), LENGTH)
    ids = documents() if packed else None
    found = both_ways(lambda *inputs: ssd_by_triton(*inputs, ids, interpret=True), weight, *inputs)
    plain = both_ways(lambda *inputs: ssd(*inputs, ids, 40)[0], weight, *inputs)
    for mine, right in zip(found, plain, strict=True):
        np.testing.assert_allclose(mine, right, atol=2e-6 * np.abs(right).max())


def test_in_bfloat16_values_and_gradients_are_within_its_rounding():
    """Of the same numbers in float32: 2⁻⁸ of the largest, and of dt and a, which are differences of sums, 2⁻⁷ of it."""
    (x, dt, a, b, c), _, weight = draw((1, 3, 32, 32), LENGTH)
    x, b, c = (jnp.asarray(u, jnp.bfloat16) for u in (x, b, c))
    form = lambda *inputs: ssd_by_triton(*inputs, documents(), interpret=True)
    found = both_ways(form, weight, x, dt, a, b, c)
    right = both_ways(form, weight, *(jnp.asarray(u, jnp.float32) for u in (x, dt, a, b, c)))
    for n, (mine, exact) in enumerate(zip(found, right, strict=True)):
        assert mine.dtype == (jnp.float32 if n in (0, 2, 3) else jnp.bfloat16)
        np.testing.assert_allclose(np.float32(mine), exact, atol=(2**-7 if n in (2, 3) else 2**-8) * float(jnp.abs(exact).max()))


def test_the_decay_has_no_gradient_in_documents_of_one_token():
    """Whose y is dt x (b · c): it does not depend on a, and not by rounding to bfloat16 either."""
    (x, dt, a, b, c), _, weight = draw((1, 2, 16, 16), CHUNK)
    ids = np.tile(np.arange(CHUNK, dtype=np.int32), (2, 1))
    narrow = (jnp.asarray(u, jnp.bfloat16) for u in (b, c))
    form = lambda *inputs: ssd_by_triton(*inputs, ids, interpret=True)
    y, *gradients = both_ways(form, weight, jnp.asarray(x, jnp.bfloat16), dt, a, *narrow)
    size = np.linalg.norm(y * weight * dt[..., None])
    np.testing.assert_allclose(gradients[2], np.zeros_like(a), atol=1e-6 * size)


def test_a_program_for_a_gpu_has_the_kernels_where_they_are_asked_for():
    mixer = Mamba(heads=6, head_dim=32, groups=2, state=64, chunk=32)
    layer = numpy_params(Arch.from_pattern('M', vocab=4, embed=6, mamba=mixer))['layer_000']
    ids = np.repeat([1, 2], [60, CHUNK])[None]
    context = context_for(ids, ids)
    x = np.zeros((1, CHUNK + 60, 6), np.float32)

    def program(target):
        own = dataclasses.replace(context, target=target)
        return cuda.lowered(jax.grad(lambda layer: mamba(layer, x, mixer, own, None).y_BxTxD.sum()), layer)

    names = ('ssd_states', 'ssd_outputs', 'ssd_head_gradients', 'ssd_group_gradients')
    by_kernel, plain = program(Target('cuda', kernels=True)), program(Target('cuda'))
    assert all(name in by_kernel and name not in plain for name in names)
    assert 'xla.gpu.triton' in by_kernel and 'xla.gpu.triton' not in plain


def test_a_program_in_bfloat16_at_the_published_widths_lowers():
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    x, bc = shaped(jnp.bfloat16, 1, 8192, 8, 7, 64), shaped(jnp.bfloat16, 1, 8192, 8, 128)
    dt, a = shaped(jnp.float32, 1, 8192, 8, 7), shaped(jnp.float32, 8, 7)
    assert fits_ssd_triton(x.shape, 128)
    run = jax.grad(lambda x, dt, a, b, c: ssd_by_triton(x, dt, a, b, c, None).sum(), argnums=(0, 1, 2, 3, 4))
    assert 'ssd_group_gradients' in cuda.lowered(run, x, dt, a, bc, bc)


def test_shapes_that_tiles_do_not_hold_are_left_to_xla():
    assert fits_ssd_triton((1, 8192, 8, 8, 64), 256) and fits_ssd_triton((1, CHUNK, 1, 5, 128), 128)
    for shape, state in (
        ((1, CHUNK - 1, 8, 8, 64), 128),
        ((1, 8192, 8, 8, 80), 128),
        ((1, 8192, 8, 8, 8), 128),
        ((1, 8192, 8, 8, 64), 96),
        ((1, 8192, 8, 8, 64), 512),
        ((1, 8192, 8, 8, 128), 256),
    ):
        assert not fits_ssd_triton(shape, state)
