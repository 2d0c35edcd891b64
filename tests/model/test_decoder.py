"""The whole decoder against the float64 oracle, documents packed; and the Linen shell's check of shapes."""

import dataclasses

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.context import context_for
from elastic_jax.model.decoder import Decoder
from elastic_jax.model.params import init_params
from tests.model import oracle
from tests.tiny import FAMILIES, HYBRID, LLAMA, numpy_params

# Rows of documents: several boundaries inside one chunk of 8 tokens, documents of one token, padding at the end (0).
LENGTHS = [[3, 1, 2, 11, 2], [19], [9, 9]]
PADDED = 21


def packed(rng, vocab):
    """(documents by row, tokens [B, T], segment ids [B, T])."""
    documents = [[rng.integers(0, vocab, length) for length in row] for row in LENGTHS]
    tokens, segments = np.zeros((len(LENGTHS), PADDED), np.int32), np.zeros((len(LENGTHS), PADDED), np.int32)
    for row, own in enumerate(documents):
        joined = np.concatenate(own)
        tokens[row, : len(joined)] = joined
        segments[row, : len(joined)] = np.repeat(np.arange(len(own)) + 1, [len(document) for document in own])
    tokens[segments == 0] = 5
    return documents, tokens, segments


@pytest.mark.parametrize('layout', [FLAT, Layout(mlp=4, shared_width=2, experts=2, kv_heads=2)], ids=['flat', 'blocked'])
@pytest.mark.parametrize('name', FAMILIES)
def test_packed_documents_give_the_logits_of_each_document_alone(name, layout):
    arch = FAMILIES[name]
    params = numpy_params(arch, layout)
    documents, tokens, segments = packed(np.random.default_rng(1), arch.vocab)
    found = jax.jit(Decoder(arch, layout).apply)({'params': params}, tokens, segments)
    assert np.isfinite(found).all()
    for row, own in enumerate(documents):
        expected = np.concatenate([oracle.logits(params, document, arch) for document in own])
        np.testing.assert_allclose(found[row, : len(expected)], expected, atol=1e-5 * np.abs(expected).max())


def test_without_segments_a_row_is_one_document():
    params, tokens = numpy_params(HYBRID), np.random.default_rng(2).integers(0, 64, (2, 11))
    found = jax.jit(Decoder(HYBRID).apply)({'params': params}, tokens)
    for row in range(2):
        expected = oracle.logits(params, tokens[row], HYBRID)
        np.testing.assert_allclose(found[row], expected, atol=1e-5 * np.abs(expected).max())


def test_dropped_blocks_are_the_identity():
    child = dataclasses.replace(HYBRID, ranking=(2, 0, 4, 3, 1)).narrow(layers=3)
    params, tokens = numpy_params(child), np.random.default_rng(3).integers(0, 64, (1, 9))
    expected = oracle.logits(params, tokens[0], child)
    found = jax.jit(Decoder(child).apply)({'params': params}, tokens)
    np.testing.assert_allclose(found[0], expected, atol=1e-5 * np.abs(expected).max())


def test_padding_receives_no_influence_and_gives_none():
    params = numpy_params(HYBRID)
    _, tokens, segments = packed(np.random.default_rng(4), 64)
    other = np.where(segments == 0, 9, tokens)
    run = jax.jit(Decoder(HYBRID).apply)
    found, expected = (np.asarray(run({'params': params}, inputs, segments)) for inputs in (tokens, other))
    np.testing.assert_array_equal(found[segments > 0], expected[segments > 0])


def test_positions_default_to_the_place_in_the_document():
    segments = jnp.asarray([[1, 1, 1, 2, 3, 3, 0, 0], [4, 4, 4, 4, 4, 1, 1, 1]])
    positions = context_for(jnp.zeros((2, 8), int), segments).positions_BxT
    np.testing.assert_array_equal(positions, [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2]])
    np.testing.assert_array_equal(context_for(jnp.zeros((2, 3), int)).positions_BxT, [[0, 1, 2]] * 2)


@pytest.mark.parametrize('widths', [{'embed': 24}, {'mlp': 16}, {'experts': 4}, {'mamba_head_dim': 2}], ids=str)
def test_parameters_that_were_not_sliced_raise(widths):
    with pytest.raises(flax.errors.ScopeParamShapeError):
        jax.eval_shape(Decoder(HYBRID.narrow(widths)).apply, {'params': numpy_params(HYBRID)}, np.zeros((1, 4), np.int32))


def test_missing_blocks_raise():
    with pytest.raises(flax.errors.ScopeParamNotFoundError):
        jax.eval_shape(Decoder(HYBRID).apply, {'params': numpy_params(HYBRID.narrow(layers=4))}, np.zeros((1, 4), np.int32))


def test_linen_initialises_the_declared_parameters():
    tokens = np.zeros((1, 4), np.int32)
    shapes = jax.eval_shape(Decoder(LLAMA, param_dtype=jnp.bfloat16).init, jax.random.key(0), tokens)['params']
    expected = jax.eval_shape(lambda key: init_params(key, LLAMA, dtype=jnp.bfloat16), jax.random.key(0))
    assert shapes == expected


def test_low_precision_stays_near_the_oracle():
    params, tokens = numpy_params(HYBRID), np.random.default_rng(5).integers(0, 64, (1, 12))
    found = jax.jit(Decoder(HYBRID, dtype=jnp.bfloat16).apply)({'params': params}, tokens)
    assert found.dtype == jnp.float32
    expected = oracle.logits(params, tokens[0], HYBRID)
    error = np.abs(found[0] - expected)
    assert np.median(error) < 0.02 * np.abs(expected).max()
