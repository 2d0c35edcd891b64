"""Held-out loss of one submodel: nats per token and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.arch import Arch
from elastic_jax.errors import WorkError
from elastic_jax.model.context import context_for
from elastic_jax.model.decoder import hidden_states, unembedding
from elastic_jax.model.losses import Students, cross_entropy_losses

Batch = dict[str, np.ndarray]
INPUTS = ('tokens', 'targets', 'segment_ids', 'positions', 'loss_mask')


@partial(jax.jit, static_argnames=('arch', 'dtype', 'chunk'))
def _summed_loss(params: Any, batch: Batch, arch: Arch, dtype: Any, chunk: int) -> jax.Array:
    """Total nats over the scored tokens of a batch."""
    context = context_for(batch['tokens'], batch['segment_ids'], batch['positions'], norm_eps=arch.norm_eps, dtype=dtype)
    hidden_BxTxD, _ = hidden_states(params, batch['tokens'], arch, context)
    students = [Students((hidden_BxTxD,), unembedding(params))]
    return cross_entropy_losses(students, [1.0], batch['targets'], batch['loss_mask'], 1.0, chunk)[0]


def evaluate(params: Any, arch: Arch, batches: Iterable[Batch], dtype: Any = jnp.float32, chunk: int = 512) -> dict[str, float]:
    """Held-out scores of a submodel: loss (nats per token), perplexity, bits_per_byte, tokens, bytes.

    Args:
      params: the submodel's own (sliced) parameters.
      batches: dicts of [B, T] arrays as `data.pipeline` makes them; `target_bytes` says how many bytes each target token
        stands for, `loss_mask` which tokens are scored. Batches of one shape share one compiled program per `arch`.
    Raises: WorkError when there is no token to score.
    """
    return score(lambda inputs: _summed_loss(params, inputs, arch, jnp.dtype(dtype), chunk), batches)


def score(summed_loss: Callable[[Batch], jax.Array], batches: Iterable[Batch]) -> dict[str, float]:
    """As `evaluate`, for any function that gives the total nats over the scored tokens of a batch."""
    sums, tokens, text_bytes = [], 0.0, 0.0
    for batch in batches:
        # Fetched at the end: the next batch is made while the device works on this one.
        sums.append(summed_loss({key: batch[key] for key in INPUTS}))
        mask = np.asarray(batch['loss_mask'], np.float64)
        tokens += float(mask.sum())
        text_bytes += float((np.asarray(batch['target_bytes'], np.float64) * mask).sum())
    if not tokens:
        raise WorkError('there is no held-out token to score; give a longer text')
    nats = sum(float(total) for total in sums)
    loss = nats / tokens
    bits_per_byte = nats / math.log(2) / text_bytes if text_bytes else math.nan
    with np.errstate(over='ignore'):
        perplexity = float(np.exp(loss))
    return {'loss': loss, 'perplexity': perplexity, 'bits_per_byte': bits_per_byte, 'tokens': tokens, 'bytes': text_bytes}
