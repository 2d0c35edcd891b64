"""Choosing the next token: greedy, temperature, top-k, top-p, repetition penalty; one seed per request."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from elastic_jax.errors import UserError


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


def next_token_logits(logits_BxV: jax.Array, seen_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits that tokens are drawn from: penalised, scaled and cut. `seen_BxV` marks tokens that came before."""
    if sampling.repetition_penalty != 1.0:
        penalised = jnp.where(logits_BxV > 0, logits_BxV / sampling.repetition_penalty, logits_BxV * sampling.repetition_penalty)
        logits_BxV = jnp.where(seen_BxV, penalised, logits_BxV)
    if sampling.temperature == 0:
        return logits_BxV
    logits_BxV = logits_BxV / sampling.temperature
    if sampling.top_k and sampling.top_k < logits_BxV.shape[-1]:
        smallest = jax.lax.top_k(logits_BxV, sampling.top_k)[0][..., -1:]
        logits_BxV = jnp.where(logits_BxV >= smallest, logits_BxV, -jnp.inf)
    if sampling.top_p < 1:
        falling_BxV = -jnp.sort(-logits_BxV, axis=-1)
        probability_BxV = jax.nn.softmax(falling_BxV, axis=-1)
        # A token stays while the mass before it is below top_p; so the first always does.
        before_BxV = jnp.cumsum(probability_BxV, axis=-1) - probability_BxV
        smallest = jnp.min(jnp.where(before_BxV < sampling.top_p, falling_BxV, jnp.inf), axis=-1, keepdims=True)
        logits_BxV = jnp.where(logits_BxV >= smallest, logits_BxV, -jnp.inf)
    return logits_BxV


def draw(logits_BxV: jax.Array, seen_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """The next token of each row, [B]; rows draw from keys of their own."""
    final_BxV = next_token_logits(logits_BxV, seen_BxV, sampling)
    if sampling.temperature == 0:
        return jnp.argmax(final_BxV, axis=-1)
    return jax.vmap(jax.random.categorical)(keys_B, final_BxV)
