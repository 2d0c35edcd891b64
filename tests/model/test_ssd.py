"""The chunked state-space recurrence and the convolution against step-by-step loops in float64, documents packed."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_jax.model.conv import causal_conv
from elastic_jax.model.ssd import ssd, ssd_step
from tests.model import oracle

B, G, M, P, N = 2, 2, 3, 4, 5
run_ssd = jax.jit(ssd, static_argnames='chunk')
# Few lengths and chunks, so that few programs are compiled; every other example differs in its documents.
lengths, chunks = st.sampled_from([1, 7, 16]), st.sampled_from([1, 4, 8, 64])


def draw_inputs(seed, length, decay=1.0):
    rng = np.random.default_rng(seed)
    x, b, c = (rng.normal(size=(B, length, *shape)).astype(np.float32) for shape in ((G, M, P), (G, N), (G, N)))
    dt = rng.uniform(0.0, 2.0, size=(B, length, G, M)).astype(np.float32)
    a = (-decay * rng.uniform(0.1, 3.0, size=(G, M))).astype(np.float32)
    return x, dt, a, b, c


def draw_documents(data, length):
    """Segment ids [B, T]: runs of any length, each with an id of its own, in any order."""
    starts = data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=B, max_size=B))
    order = np.asarray(data.draw(st.permutations(range(length + 1))))
    return order[np.cumsum(starts, axis=1)].astype(np.int32)


def spans(row):
    """(start, end) of each document: a run of equal ids."""
    edges = [0, *(t for t in range(1, len(row)) if row[t] != row[t - 1]), len(row)]
    return list(itertools.pairwise(edges))


def loop(x, dt, a, b, c, segments=None, state=None):
    """(y, final state), one head and one document at a time."""
    x, dt, a, b, c = (np.asarray(u, np.float64) for u in (x, dt, a, b, c))
    y, final = np.zeros(x.shape), np.zeros((B, G, M, P, N))
    for i in range(B):
        for g in range(G):
            for m in range(M):
                for start, end in spans([0] * x.shape[1] if segments is None else segments[i]):
                    span = slice(start, end)
                    own = np.zeros((P, N)) if state is None else state[i, g, m]
                    out = oracle.recurrence(x[i, span, g, m], dt[i, span, g, m], a[g, m], b[i, span, g], c[i, span, g], own)
                    y[i, span, g, m], final[i, g, m] = out
    return y, final


def assert_close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1.0, np.abs(expected).max()))


@settings(max_examples=60)
@given(lengths, chunks, st.integers(0, 9), st.data())
def test_packed_documents_follow_the_recurrence(length, chunk, seed, data):
    inputs, segments = draw_inputs(seed, length), draw_documents(data, length)
    y, final = run_ssd(*inputs, segments, chunk=chunk)
    expected, expected_final = loop(*inputs, segments)
    assert_close(y, expected)
    assert_close(final, expected_final)


@given(lengths, chunks, st.integers(0, 9))
def test_a_state_is_carried_on(length, chunk, seed):
    inputs = draw_inputs(seed, length)
    state = np.random.default_rng(seed + 100).normal(size=(B, G, M, P, N)).astype(np.float32)
    y, final = run_ssd(*inputs, None, chunk=chunk, state_BxGxMxPxN=state)
    expected, expected_final = loop(*inputs, None, state)
    assert_close(y, expected)
    assert_close(final, expected_final)


def test_single_steps_follow_the_recurrence():
    x, dt, a, b, c = draw_inputs(3, 6)
    state = np.random.default_rng(4).normal(size=(B, G, M, P, N)).astype(np.float32)
    expected, expected_final = loop(x, dt, a, b, c, None, state)
    step = jax.jit(ssd_step)
    for t in range(6):
        at = slice(t, t + 1)
        y, state = step(x[:, at], dt[:, at], a, b[:, at], c[:, at], state)
        assert_close(y, expected[:, at])
    assert_close(state, expected_final)


def test_fast_decay_over_long_chunks_neither_overflows_nor_loses_the_recent_past():
    inputs = draw_inputs(5, 64, decay=100.0)
    segments = np.tile(np.repeat([1, 2], [37, 27]), (B, 1)).astype(np.int32)
    y, final = run_ssd(*inputs, segments, chunk=64)
    expected, expected_final = loop(*inputs, segments)
    assert_close(y, expected, 1e-4)
    assert_close(final, expected_final, 1e-4)


def test_gradients_are_finite_where_documents_meet():
    inputs, segments = draw_inputs(6, 16, decay=30.0), np.tile(np.repeat([1, 2, 3], [3, 2, 11]), (B, 1)).astype(np.int32)
    gradients = jax.jit(jax.grad(lambda *inputs: (ssd(*inputs, segments, 8)[0] ** 2).sum(), argnums=range(5)))(*inputs)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    # A direction's derivative is the difference of the loop's values.
    direction, step = draw_inputs(7, 16), 1e-6
    value = lambda sign: (
        loop(*(u + sign * step * np.asarray(d, np.float64) for u, d in zip(inputs, direction, strict=True)), segments)[0] ** 2
    ).sum()
    along = sum(np.vdot(gradient, d) for gradient, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(along, (value(1) - value(-1)) / (2 * step), rtol=1e-4)


@pytest.mark.parametrize('channels', [(3,), (2, 3)], ids=str)
@pytest.mark.parametrize('taps', [1, 2, 4])
@settings(max_examples=10)
@given(st.data())
def test_convolution_and_its_gradients_are_the_loops(taps, channels, data):
    length = 7
    segments = draw_documents(data, length)
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    u, weight = (rng.normal(size=(B, length, *channels)).astype(np.float32) for _ in range(2))
    kernel, bias = rng.normal(size=(taps, *channels)).astype(np.float32), rng.normal(size=channels).astype(np.float32)
    value, gradients = convolution_gradients(u, kernel, bias, segments, weight)
    expected, u_gradient, kernel_gradient = np.zeros(u.shape), np.zeros(u.shape), np.zeros(kernel.shape)
    for i in range(B):
        for start, end in spans(segments[i]):
            expected[i, start:end] = oracle.convolve(u[i, start:end], kernel, bias)
            for t in range(start, end):
                for shift in range(min(taps, t - start + 1)):
                    u_gradient[i, t - shift] += weight[i, t] * kernel[-1 - shift]
                    kernel_gradient[-1 - shift] += weight[i, t] * u[i, t - shift]
    assert_close(value, expected)
    assert_close(gradients[0], u_gradient)
    assert_close(gradients[1], kernel_gradient)
    assert_close(gradients[2], weight.sum((0, 1)))


@jax.jit
def convolution_gradients(u, kernel, bias, segments, weight):
    y, backward = jax.vjp(lambda *inputs: causal_conv(*inputs, segments, None), u, kernel, bias)
    return y, backward(weight)


def test_convolution_goes_on_from_a_cache():
    rng = np.random.default_rng(8)
    u, kernel = rng.normal(size=(B, 9, 3)).astype(np.float32), rng.normal(size=(4, 3)).astype(np.float32)
    run = jax.jit(partial(causal_conv, bias_C=None, segment_ids_BxT=None))
    found = run(u[:, 5:], kernel, past_BxKxC=u[:, 2:5])
    for row in range(B):
        assert_close(found[row], oracle.convolve(u[row], kernel, 0.0)[5:])
