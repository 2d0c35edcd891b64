"""The feed-forward block."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from elastic_jax.arch import MLP
from elastic_jax.model.collectives import Axes, enter, leave
from elastic_jax.model.context import HARD, Context, Mixed, Soft
from elastic_jax.model.linear import linear
from elastic_jax.model.shapes import lead


def feed_forward(
    x: jax.Array,
    up: jax.Array,
    gate: jax.Array | None,
    down: jax.Array,
    biases: tuple[jax.Array | None, ...] = (None,) * 3,
    axes: Axes = (),
) -> tuple[jax.Array, jax.Array]:
    """(output [..., D], activation [..., F]) of a relu² network, or of a SwiGLU one when there is a gate.

    `axes` are the mesh axes that split F.

    Shapes: up, gate [D, G, F/G]; down [G, F/G, D]. The two dimensions of a blocked width are merged for the matmuls.
    """
    up_bias, gate_bias, down_bias = biases
    x = enter(x, axes)
    hidden = _affine(x, up.reshape(up.shape[0], -1), up_bias)
    if gate is None:
        activation = jnp.square(jax.nn.relu(hidden))
    else:
        activation = jax.nn.silu(_affine(x, gate.reshape(gate.shape[0], -1), gate_bias)) * hidden
    y = leave(linear(activation, down.reshape(-1, down.shape[-1])), axes)
    return _add(y, down_bias), activation


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
    return _add(linear(x, kernel), bias)


def _add(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + lead(bias.reshape(-1), y).astype(y.dtype)


def mlp(params: dict[str, jax.Array], x_BxTxD: jax.Array, mixer: MLP, context: Context, cache: None, soft: Soft = HARD) -> Mixed:
    """The MLP mixer."""
    del mixer, cache, soft
    axes = context.shards.of('mlp_blocks')
    biases = (params.get('up_bias'), params.get('gate_bias'), params.get('down_bias'))
    y_BxTxD, act_BxTxF = feed_forward(x_BxTxD, params['up'], params.get('gate'), params['down'], biases, axes)
    return Mixed(y_BxTxD, None, {'mlp': act_BxTxF} if context.taps else {})
