"""Depthwise causal convolution that sees only its own document."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from elastic_jax.model.shapes import lead


def causal_conv(
    u_BxTxC: jax.Array,
    kernel_KxC: jax.Array,
    bias_C: jax.Array | None,
    segment_ids_BxT: jax.Array | None,
    past_BxKxC: jax.Array | None,
) -> jax.Array:
    """y_t = Σ_s kernel[K-1-s] · u_{t-s} + bias along T, over the tokens of t's own document; C may be several dimensions.

    `past_BxKxC` holds the K-1 inputs before the first (a cache); without it they are zero.
    """
    taps = kernel_KxC.shape[0]
    if past_BxKxC is None:
        past_BxKxC = jnp.zeros((u_BxTxC.shape[0], taps - 1, *u_BxTxC.shape[2:]), u_BxTxC.dtype)
    padded = jnp.concatenate([past_BxKxC.astype(u_BxTxC.dtype), u_BxTxC], axis=1)
    y = _windows(padded, kernel_KxC.astype(u_BxTxC.dtype), _same_document(segment_ids_BxT, u_BxTxC, taps))
    return y if bias_C is None else y + lead(bias_C, y).astype(y.dtype)


def _same_document(segment_ids_BxT: jax.Array | None, u_BxTxC: jax.Array, taps: int) -> jax.Array | None:
    """[K, B, T, 1…]: 1 where token t - s is of the same document as token t, for shift s; None when all are."""
    if segment_ids_BxT is None:
        return None
    length = segment_ids_BxT.shape[1]
    before = jnp.pad(segment_ids_BxT, ((0, 0), (taps - 1, 0)), constant_values=-1)
    shifted = jnp.stack([before[:, taps - 1 - s : taps - 1 - s + length] for s in range(taps)])
    same = (shifted == segment_ids_BxT[None]).astype(u_BxTxC.dtype)
    return same.reshape(*same.shape, *(1,) * (u_BxTxC.ndim - 2))


def _take(x: jax.Array, start: int, length: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, start, start + length, axis=1)


# Written out, with both paddings kept as arrays: fused into the shifts, XLA computes them again for every element and tap.
@jax.custom_vjp
def _windows(padded: jax.Array, kernel_KxC: jax.Array, same: jax.Array | None) -> jax.Array:
    taps = kernel_KxC.shape[0]
    length = padded.shape[1] - taps + 1
    padded = jax.lax.optimization_barrier(padded)
    terms = [_take(padded, taps - 1 - s, length) * lead(kernel_KxC[-1 - s], padded) for s in range(taps)]
    return sum(term if same is None else term * same[s] for s, term in enumerate(terms))


def _forward(padded: jax.Array, kernel_KxC: jax.Array, same: jax.Array | None) -> tuple[jax.Array, tuple]:
    return _windows(padded, kernel_KxC, same), (padded, kernel_KxC, same)


def _backward(residuals: tuple, y_grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    padded, kernel_KxC, same = residuals
    taps, length = kernel_KxC.shape[0], y_grad.shape[1]
    ends = ((0, 0), (taps - 1, taps - 1)) + ((0, 0),) * (y_grad.ndim - 2)
    grad = jax.lax.optimization_barrier(jnp.pad(y_grad, ends))
    padded = jax.lax.optimization_barrier(padded)
    padded_grad, kernel_grads = 0.0, []
    for s in range(taps):
        # Input j feeds output j - (K-1) + s, so the gradient is read from s places further on in the doubly padded one.
        term = _take(grad, s, padded.shape[1])
        masked = y_grad
        if same is not None:
            term = term * _take(jnp.pad(same[s], ends), s, padded.shape[1])
            masked = y_grad * same[s]
        padded_grad = padded_grad + term * lead(kernel_KxC[-1 - s], padded)
        kernel_grads.append(jnp.sum(_take(padded, taps - 1 - s, length) * masked, axis=(0, 1)))
    return padded_grad, jnp.stack(kernel_grads[::-1]), None


_windows.defvjp(_forward, _backward)
