"""Attention by the GPU's kernels, interpreted: against the closed form in float64, and lowered for a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.arch import Arch, Attention
from elastic_jax.model.attention import attend_causally, attention
from elastic_jax.model.context import context_for
from elastic_jax.model.flash_triton import (
    BLOCK,
    HEADS,
    SHORTEST,
    fits_flash_triton,
    flash_attention_by_triton,
    meeting_blocks,
)
from elastic_jax.model.kernels import Target
from tests.model import cuda
from tests.model.gradients import both_ways
from tests.model.test_flash import closed_form
from tests.tiny import numpy_params

LENGTH = 2 * BLOCK + 40  # three blocks, the last padded


def documents(rng, length):
    """Ids that grow, with an end at a block's end; and ids that come again, which no block can be left out by."""
    grown = np.cumsum(rng.uniform(size=length) < 0.04)
    grown[BLOCK:] += 1
    return np.stack([grown, grown % 3]).astype(np.int32)


def draw(kv_heads, per_kv, head_dim, length=LENGTH):
    rng = np.random.default_rng(3)
    q, out_gradient = rng.normal(size=(2, 2, length, kv_heads, per_kv, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, head_dim)).astype(np.float32)
    return q, k, v, out_gradient, documents(rng, length)


# Heads of a power of two and of none; one query head a KV head, three, and more than one program sums.
@pytest.mark.parametrize(
    ('kv_heads', 'per_kv', 'head_dim', 'segmented'), [(2, 3, 16, True), (1, HEADS + 2, 40, True), (2, 1, 8, False)]
)
def test_values_and_gradients_are_the_closed_form(kv_heads, per_kv, head_dim, segmented):
    q, k, v, out_gradient, ids = draw(kv_heads, per_kv, head_dim)
    form = lambda *inputs: flash_attention_by_triton(*inputs, ids if segmented else None, interpret=True)
    found = both_ways(form, out_gradient, q, k, v)
    wide = [u.astype(np.float64) for u in (q, k, v, out_gradient)]
    expected = closed_form(*wide, ids if segmented else np.zeros_like(ids))
    for mine, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, right, atol=3e-6 * np.abs(right).max())


def test_in_bfloat16_values_and_gradients_are_within_its_rounding():
    """Of the same numbers in float32: 2⁻⁷ of the largest."""
    *inputs, out_gradient, ids = draw(1, 2, 32)
    inputs = [jnp.asarray(u, jnp.bfloat16) for u in inputs]
    out_gradient = jnp.asarray(out_gradient, jnp.bfloat16)
    found = both_ways(lambda *inputs: flash_attention_by_triton(*inputs, ids, interpret=True), out_gradient, *inputs)
    wide = [jnp.asarray(u, jnp.float32) for u in (out_gradient, *inputs)]
    for mine, right in zip(found, both_ways(lambda *inputs: attend_causally(*inputs, ids), *wide), strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(mine), right, atol=2**-7 * float(jnp.abs(right).max()))


def test_blocks_that_share_no_document_are_left_out():
    ids = np.repeat([[0, 1, 2], [0, 1, 0]], [BLOCK, BLOCK + 1, BLOCK - 1], axis=1)
    first, last = meeting_blocks(jnp.asarray(ids))
    # Keys that the queries of a block meet begin with `first`; ids that come again keep what lies between.
    np.testing.assert_array_equal(first, [[0, 1, 1], [0, 1, 0]])
    np.testing.assert_array_equal(last, [[0, 2, 2], [2, 2, 2]])


def test_a_program_for_a_gpu_has_the_kernels_where_they_are_asked_for():
    """Through `Context.target`; sequences shorter than the kernels are for are left to XLA."""
    mixer = Attention(4, 2, 8)
    layer = numpy_params(Arch.from_pattern('*', vocab=4, embed=6, attention=mixer))['layer_000']

    def program(target, length):
        ids = np.ones((1, length), np.int32)
        context = dataclasses.replace(context_for(ids, ids), target=target)
        x = np.zeros((1, length, 6), np.float32)
        return cuda.lowered(jax.grad(lambda layer: attention(layer, x, mixer, context, None).y_BxTxD.sum()), layer)

    by_kernel, plain, short = (
        program(Target('cuda', kernels=True), SHORTEST + 1),
        program(Target('cuda'), SHORTEST + 1),
        program(Target('cuda', kernels=True), SHORTEST - 1),
    )
    for name in ('flash_forward', 'flash_query_gradients', 'flash_key_gradients', 'xla.gpu.triton'):
        assert name in by_kernel and name not in plain and name not in short


def test_a_program_in_bfloat16_at_the_published_widths_lowers():
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    q, k = shaped(jnp.bfloat16, 1, 8192, 2, 16, 128), shaped(jnp.bfloat16, 1, 8192, 2, 128)
    assert fits_flash_triton(8192, 128) and not fits_flash_triton(8192, 256)
    run = jax.grad(lambda q, k, v, ids: flash_attention_by_triton(q, k, v, ids).sum(), argnums=(0, 1, 2))
    assert 'flash_key_gradients' in cuda.lowered(run, q, k, k, shaped(jnp.int32, 1, 8192))
