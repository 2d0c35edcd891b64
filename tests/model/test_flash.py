"""Attention by the TPU's kernel, interpreted: against the closed form in float64, and the whole mixer against XLA's form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.arch import Arch, Attention
from elastic_jax.model import flash
from elastic_jax.model.attention import attention
from elastic_jax.model.context import context_for
from elastic_jax.model.kernels import ANYWHERE, Target
from tests.tiny import numpy_params


def closed_form(q, k, v, out_gradient, ids):
    """(heads, gradients of q, k and v) in float64, one head at a time; arrays as in the library."""
    heads = np.zeros(q.shape)
    q_gradient, k_gradient, v_gradient = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    scale = q.shape[-1] ** -0.5
    for b, h, j in np.ndindex(q.shape[0], *q.shape[2:4]):
        own = (b, slice(None), h)
        allowed = np.tril(ids[b][:, None] == ids[b][None, :])
        scores = np.where(allowed, scale * q[*own, j] @ k[own].T, -np.inf)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        heads[*own, j] = weights @ v[own]
        by_weight = out_gradient[*own, j] @ v[own].T
        by_score = weights * (by_weight - (weights * by_weight).sum(1, keepdims=True))
        q_gradient[*own, j] = scale * by_score @ k[own]
        k_gradient[own] += scale * by_score.T @ q[*own, j]
        v_gradient[own] += weights.T @ out_gradient[*own, j]
    return heads, q_gradient, k_gradient, v_gradient


@pytest.mark.parametrize(('kv_heads', 'per_kv', 'head_dim', 'segmented'), [(2, 3, 16, True), (1, 1, 136, True), (2, 1, 8, False)])
def test_values_and_gradients_are_the_closed_form(monkeypatch, kv_heads, per_kv, head_dim, segmented):
    """Two blocks and a padded end; documents that cross blocks, others within one, ids that come again."""
    monkeypatch.setattr(flash, 'BLOCK', 128)
    rng, length = np.random.default_rng(3), 200
    q, out_gradient = rng.normal(size=(2, 2, length, kv_heads, per_kv, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, head_dim)).astype(np.float32)
    ids = np.cumsum(rng.uniform(size=(2, length)) < 0.04, axis=1).astype(np.int32) if segmented else None

    @jax.jit
    def run(q, k, v, out_gradient):
        heads, backward = jax.vjp(lambda q, k, v: flash.flash_attention(q, k, v, ids, interpret=True), q, k, v)
        return heads, *backward(out_gradient)

    wide = [u.astype(np.float64) for u in (q, k, v, out_gradient)]
    expected = closed_form(*wide, np.zeros((2, length)) if ids is None else ids)
    for found, right in zip(run(q, k, v, out_gradient), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=3e-6 * np.abs(right).max())


def test_the_mixer_is_the_same_by_either_form(monkeypatch):
    """Through `Context.target`; sequences shorter than the kernel is for are left to XLA."""
    mixer = Attention(2, 2, 8)
    layer = numpy_params(Arch.from_pattern('*', vocab=4, embed=6, attention=mixer))['layer_000']
    rng, length = np.random.default_rng(4), 130
    x = rng.normal(size=(1, length, 6)).astype(np.float32)
    ids = jnp.asarray(np.cumsum(rng.uniform(size=(1, length)) < 0.05, axis=1))
    context = context_for(ids, ids)

    def run(target):
        own = dataclasses.replace(context, target=target)
        program = jax.jit(lambda layer, x: attention(layer, x, mixer, own, None).y_BxTxD).lower(layer, x)
        return program.as_text(debug_info=True), program.compile()(layer, x)

    plain, expected = run(ANYWHERE)
    assert 'splash' not in plain and 'splash' not in run(Target(kernels=True))[0]
    monkeypatch.setattr(flash, 'SHORTEST', 128)
    by_kernel, found = run(Target(kernels=True))
    assert 'splash' in by_kernel and 'splash' not in run(Target('cpu'))[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('length', [512, 640, 1000, 1024, 1025, 5000, 8192, 8200, 49152])
def test_blocks_pad_little_and_are_whole_lanes(length):
    block = flash.block_size(length)
    assert block % 128 == 0 and block <= 1024
    assert -length % block < max(128, length / 4)
    assert flash.block_size(length, head_bytes=1024) <= 512
