"""What the blocks of one forward pass share: document boundaries, positions, caches, masks."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elastic_jax.model.collectives import WHOLE, Shards
from elastic_jax.model.fetch import Summed
from elastic_jax.model.kernels import ANYWHERE, Target


@dataclasses.dataclass(frozen=True)
class Context:
    """Inputs of a forward pass beside the activations.

    Attributes:
      positions_BxT: position of each token in its document (rotary).
      segment_ids_BxT: document of each token, each with an id of its own in its row; attention, convolution and SSM state
        reset where it changes. 0 is padding.
      valid_B: with a cache, how many of this chunk's T tokens are real (prompts are padded on the right).
      length_B: with a cache, how many tokens it already holds.
      trial: with a cache, whether Mamba blocks return a `MambaTrial` in its place, so that tokens can still be taken back.
      taps: whether blocks also return the activations that importance is measured on.
      norm_eps: epsilon of every norm.
      dtype: the dtype of the matmuls.
      shards: which part of the model and of the batch this device has.
      target: what the program is traced for; one with kernels is for programs of one device's own part.
    """

    positions_BxT: jax.Array
    segment_ids_BxT: jax.Array | None = None
    valid_B: jax.Array | None = None
    length_B: jax.Array | None = None
    trial: bool = False
    norm_eps: float = 1e-5
    taps: bool = False
    dtype: Any = jnp.float32
    shards: Shards = WHOLE
    target: Target = ANYWHERE


class Soft(NamedTuple):
    """What a masked block needs beside its masked parameters (`nest/masks.py`); a hard mask makes it exact.

    Attributes:
      embed_ratio: mean share of embedding channels kept: the norms run over that many.
      gated_ratio: mean share of (head, channel) pairs kept in a Mamba block.
      experts: [G, E/G] share of each expert; 0 is never chosen.
      keep: share of this block that is kept; 0 is the identity.
    """

    embed_ratio: Any = 1.0
    gated_ratio: Any = 1.0
    experts: Any = None
    keep: Any = 1.0


HARD = Soft()


class Mixed(NamedTuple):
    """A mixer's result, or a block's.

    Attributes:
      y_BxTxD: the residual update; of a block the residual stream.
      cache: the new one, if any.
      aux: auxiliary outputs by name.
      summed: those of the parameters that came as a `Summed`, for the next user.
    """

    y_BxTxD: jax.Array
    cache: Any = None
    aux: dict[str, jax.Array] = {}  # noqa: RUF012 - never written to.
    summed: dict[str, Summed] = {}  # noqa: RUF012 - never written to.


def context_for(
    tokens_BxT: jax.Array,
    segment_ids_BxT: jax.Array | None = None,
    positions_BxT: jax.Array | None = None,
    **kwargs: Any,
) -> Context:
    """The Context of a pass without a cache; positions default to 0, 1, 2, … in each document."""
    if positions_BxT is None:
        steps_T = jnp.arange(tokens_BxT.shape[1])
        positions_BxT = jnp.broadcast_to(steps_T, tokens_BxT.shape)
        if segment_ids_BxT is not None:
            starts = jnp.concatenate(
                [jnp.ones_like(segment_ids_BxT[:, :1], bool), segment_ids_BxT[:, 1:] != segment_ids_BxT[:, :-1]], axis=1
            )
            positions_BxT = steps_T[None] - jax.lax.cummax(jnp.where(starts, steps_T[None], 0), axis=1)
    return Context(positions_BxT, segment_ids_BxT, **kwargs)
