"""The feed-forward block."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from elastic_jax.arch import MLP
from elastic_jax.model.context import HARD, Context, Mixed, Soft
from elastic_jax.model.shapes import lead


def feed_forward(
    x: jax.Array,
    up: jax.Array,
    gate: jax.Array | None,
    down: jax.Array,
    biases: tuple[jax.Array | None, ...] = (None,) * 3,
) -> tuple[jax.Array, jax.Array]:
    """(output [..., D], activation [..., F]) of a relu² network, or of a SwiGLU one when there is a gate.

    Shapes: up, gate [D, G, F/G]; down [G, F/G, D]. The two dimensions of a blocked width are merged for the matmuls.
    """
    up_bias, gate_bias, down_bias = biases
    hidden = _affine(x, up.reshape(up.shape[0], -1), up_bias)
    if gate is None:
        activation = jnp.square(jax.nn.relu(hidden))
    else:
        activation = jax.nn.silu(_affine(x, gate.reshape(gate.shape[0], -1), gate_bias)) * hidden
    return _affine(activation, down.reshape(-1, down.shape[-1]), down_bias), activation


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = x @ kernel.astype(x.dtype)
    return y if bias is None else y + lead(bias.reshape(-1), y).astype(x.dtype)


def mlp(params: dict[str, jax.Array], x_BxTxD: jax.Array, mixer: MLP, context: Context, cache: None, soft: Soft = HARD) -> Mixed:
    """The MLP mixer."""
    del mixer, cache, soft
    biases = (params.get('up_bias'), params.get('gate_bias'), params.get('down_bias'))
    y_BxTxD, act_BxTxF = feed_forward(x_BxTxD, params['up'], params.get('gate'), params['down'], biases)
    return Mixed(y_BxTxD, None, {'mlp': act_BxTxF} if context.taps else {})
