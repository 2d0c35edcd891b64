"""Held-out scores of any number of sizes by one compiled program: the parent at full width under each size's masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.arch import Arch
from elastic_jax.evaluate.perplexity import Batch, score
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.context import context_for
from elastic_jax.model.decoder import hidden_states, unembedding
from elastic_jax.model.losses import Students, cross_entropy_losses
from elastic_jax.nest.masks import Masks, hard_masks, mask_params, softs


@partial(jax.jit, static_argnames=('parent', 'layout', 'dtype', 'chunk'))
def _summed_loss(params: Any, masks: Masks, batch: Batch, parent: Arch, layout: Layout, dtype: Any, chunk: int) -> jax.Array:
    """Total nats over the scored tokens of a batch."""
    context = context_for(batch['tokens'], batch['segment_ids'], batch['positions'], norm_eps=parent.norm_eps, dtype=dtype)
    masked = mask_params(params, parent, masks, layout)
    hidden_BxTxD, _ = hidden_states(masked, batch['tokens'], parent, context, softs(parent, masks, layout))
    students = [Students((hidden_BxTxD,), unembedding(masked))]
    return cross_entropy_losses(students, [1.0], batch['targets'], batch['loss_mask'], 1.0, chunk)[0]


def evaluate_masked(
    params: Any,
    parent: Arch,
    child: Arch,
    batches: Sequence[Batch],
    layout: Layout = FLAT,
    dtype: Any = jnp.float32,
    chunk: int = 512,
) -> dict[str, float]:
    """As `perplexity.evaluate` of the slice `child`, from the parent's parameters: the same numbers up to rounding.

    Every `child` costs a pass of the parent, but none of them a compilation.
    """
    masks = jax.tree.map(jnp.float32, hard_masks(parent, child, layout))
    return score(lambda inputs: _summed_loss(params, masks, inputs, parent, layout, jnp.dtype(dtype), chunk), batches)
