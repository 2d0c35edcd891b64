"""Prefill in chunks and decoding step by step give the logits of one full pass, rows of unequal length together."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.model.cache import cached_logits, init_cache
from elastic_jax.model.decoder import Decoder
from tests.tiny import FAMILIES, HYBRID, numpy_params

TOTAL = 21
# Tokens of each row's chunk that are real; the chunk is padded to its longest. Rows fall out of step, and may stand still.
CHUNKS = [(10, [10, 3]), (10, [2, 10]), (1, [1, 0]), (1, [1, 1]), (1, [0, 1]), (1, [1, 1])]


@partial(jax.jit, static_argnames='arch')
def run(params, tokens, cache, valid, arch):
    return cached_logits(params, tokens, arch, cache, valid)


@pytest.mark.parametrize('name', ['hybrid', 'llama', 'qwen_moe', 'options'])
def test_chunks_and_steps_give_the_logits_of_a_full_pass(name):
    arch = FAMILIES[name]
    params, tokens = numpy_params(arch), np.random.default_rng(1).integers(0, arch.vocab, (2, TOTAL))
    full = np.asarray(jax.jit(Decoder(arch).apply)({'params': params}, tokens))
    cache, done = init_cache(arch, 2, 32), np.zeros(2, int)
    for size, valid in CHUNKS:
        chunk = np.full((2, size), 7)  # What follows the real tokens must leave no trace.
        for row, count in enumerate(valid):
            chunk[row, :count] = tokens[row, done[row] : done[row] + count]
        logits, cache = run(params, chunk, cache, jnp.asarray(valid), arch)
        for row, count in enumerate(valid):
            expected = full[row, done[row] : done[row] + count]
            np.testing.assert_allclose(logits[row, :count], expected, atol=1e-5 * np.abs(full).max())
        done += valid
    np.testing.assert_array_equal(cache.length_B, done)


def test_a_chunk_runs_again_from_a_saved_cache():
    """What speculative decoding needs: of a chunk that was run whole, keep only the first tokens."""
    params, tokens = numpy_params(HYBRID), np.random.default_rng(2).integers(0, 64, (2, 20))
    _, saved = run(params, tokens[:, :10], init_cache(HYBRID, 2, 32), jnp.asarray([10, 10]), HYBRID)
    run(params, tokens[:, 10:], saved, jnp.asarray([10, 10]), HYBRID)
    _, partly = run(params, tokens[:, 10:], saved, jnp.asarray([4, 1]), HYBRID)
    full = np.asarray(jax.jit(Decoder(HYBRID).apply)({'params': params}, tokens))
    logits, _ = run(params, np.stack([tokens[0, 14:15], tokens[1, 11:12]]), partly, jnp.asarray([1, 1]), HYBRID)
    np.testing.assert_allclose(logits[:, 0], [full[0, 14], full[1, 11]], atol=1e-5 * np.abs(full).max())


def test_caches_may_be_kept_in_low_precision():
    params, tokens = numpy_params(HYBRID), np.random.default_rng(3).integers(0, 64, (2, 20))
    cache = init_cache(HYBRID, 2, 32, jnp.bfloat16)
    for start in (0, 10):
        logits, cache = run(params, tokens[:, start : start + 10], cache, jnp.asarray([10, 10]), HYBRID)
    assert cache.blocks['layer_002'].k_BxKxHxS.dtype == cache.blocks['layer_000'].x.dtype == jnp.bfloat16
    assert cache.blocks['layer_000'].state_BxGxMxPxN.dtype == jnp.float32
    full = np.asarray(jax.jit(Decoder(HYBRID).apply)({'params': params}, tokens))[:, 10:]
    assert 0 < np.median(np.abs(logits - full)) < 0.01 * np.abs(full).max()
