"""Choosing the next token: greedy, temperature, top-k, top-p, repetition penalty; every row of a batch in its own way.

The settings are arrays, not constants of the program: requests of any kind share one compiled step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.errors import UserError

# What is above 0 stays so in float32, and logits remain finite, by a penalty and a temperature together.
FURTHEST, STRONGEST_PENALTY = 1e30, 1e6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing; repetition_penalty 1 changes nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        bounds = {
            'temperature': (self.temperature >= 0, 'at least 0'),
            'top_k': (self.top_k >= 0, 'at least 0'),
            'top_p': (0 < self.top_p <= 1, 'above 0 and at most 1'),
            'repetition_penalty': (self.repetition_penalty > 0, 'above 0'),
        }
        for name, (good, bound) in bounds.items():
            if not good:
                raise UserError(f'{name}={getattr(self, name)} must be {bound}')


class Knobs(NamedTuple):
    """The settings of every row."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    repetition_penalty_B: jax.Array


def knobs_of(samplings: Sequence[Sampling]) -> Knobs:
    """The settings of rows as arrays [B]."""
    column = lambda values, dtype: np.asarray(list(values), dtype)
    within = lambda value, most=FURTHEST: min(max(value, 1 / most), most) if value > 0 else value
    return Knobs(
        column((within(sampling.temperature) for sampling in samplings), np.float32),
        column((min(sampling.top_k, 2**31 - 1) for sampling in samplings), np.int32),
        column((within(sampling.top_p) for sampling in samplings), np.float32),
        column((within(sampling.repetition_penalty, STRONGEST_PENALTY) for sampling in samplings), np.float32),
    )


def next_token_logits(logits_BxV: jax.Array, seen_BxV: jax.Array, knobs: Knobs) -> jax.Array:
    """The logits that tokens are drawn from: penalised, scaled and cut. `seen_BxV` marks tokens that came before."""
    penalty_Bx1 = knobs.repetition_penalty_B[:, None]
    penalised_BxV = jnp.where(logits_BxV > 0, logits_BxV / penalty_Bx1, logits_BxV * penalty_Bx1)
    logits_BxV = jnp.where(seen_BxV, penalised_BxV, logits_BxV)
    warm_B = knobs.temperature_B > 0
    logits_BxV = logits_BxV / jnp.where(warm_B, knobs.temperature_B, 1.0)[:, None]
    top_k_B = jnp.where((knobs.top_k_B > 0) & warm_B, jnp.minimum(knobs.top_k_B, logits_BxV.shape[1]), logits_BxV.shape[1])
    top_p_B = jnp.where(warm_B, knobs.top_p_B, 1.0)
    cut = jnp.any((top_k_B < logits_BxV.shape[1]) | (top_p_B < 1))
    # Sorting a large vocabulary takes longer than a small model's step: only where a row asks for it.
    return jax.lax.cond(cut, _cut, lambda logits, *_: logits, logits_BxV, top_k_B, top_p_B)


def _cut(logits_BxV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    falling_BxV = -jnp.sort(-logits_BxV, axis=-1)
    kth_Bx1 = jnp.take_along_axis(falling_BxV, top_k_B[:, None] - 1, axis=1)
    probability_BxV = jax.nn.softmax(jnp.where(falling_BxV >= kth_Bx1, falling_BxV, -jnp.inf), axis=-1)
    # A token stays while the mass before it is below top_p; so the first always does.
    before_BxV = jnp.cumsum(probability_BxV, axis=-1) - probability_BxV
    stays_BxV = (before_BxV < top_p_B[:, None]) | (top_p_B >= 1)[:, None]
    smallest_Bx1 = jnp.min(jnp.where(stays_BxV, falling_BxV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BxV >= jnp.maximum(smallest_Bx1, kth_Bx1), logits_BxV, -jnp.inf)


def draw(logits_BxV: jax.Array, seen_BxV: jax.Array, keys_B: jax.Array, knobs: Knobs) -> jax.Array:
    """The next token of each row, [B] int32; rows draw from keys of their own."""
    final_BxV = next_token_logits(logits_BxV, seen_BxV, knobs)
    greedy_B = jnp.argmax(final_BxV, axis=-1).astype(jnp.int32)

    def sample() -> jax.Array:
        drawn_B = jax.vmap(jax.random.categorical)(keys_B, final_BxV).astype(jnp.int32)
        return jnp.where(knobs.temperature_B > 0, drawn_B, greedy_B)

    return jax.lax.cond(jnp.any(knobs.temperature_B > 0), sample, lambda: greedy_B)


def token_probabilities(logits_BxV: jax.Array, seen_BxV: jax.Array, knobs: Knobs) -> jax.Array:
    """The distribution [B, V] that `draw` draws from; of a greedy row all mass is on its best token."""
    final_BxV = next_token_logits(logits_BxV, seen_BxV, knobs)
    one_hot_BxV = jax.nn.one_hot(jnp.argmax(final_BxV, axis=-1), final_BxV.shape[1])
    return jnp.where((knobs.temperature_B > 0)[:, None], jax.nn.softmax(final_BxV, axis=-1), one_hot_BxV)


def entropy(logits_BxV: jax.Array) -> jax.Array:
    """The entropy of each row's next token, [B], in nats, as the model itself gives it."""
    log_p_BxV = jax.nn.log_softmax(logits_BxV, axis=-1)
    return -jnp.sum(jnp.exp(log_p_BxV) * log_p_BxV, axis=-1)
