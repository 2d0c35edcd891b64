"""Between parent and elastic training: measure importance, permute every axis into its order, rank the layers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elastic_jax.arch import Arch
from elastic_jax.data.pipeline import make_iterator
from elastic_jax.nest import importance
from elastic_jax.nest.ordering import Ordering, apply_ordering, make_ordering
from elastic_jax.parallel.placement import Placement
from elastic_jax.train.setup import Plan


def order_parent(params: Any, plan: Plan, place: Placement, say: Callable[[str], None]) -> tuple[Any, Ordering, Arch]:
    """(parameters in order of importance, the ordering, the parent with its layers ranked)."""
    config, parent = plan.config.calibrate, plan.parent
    stream = make_iterator(
        plan.config.data, split='train', batch_size=config.batch_size, context=config.context, seed=plan.config.seed + 1
    )
    batches = [place.put_whole_batch(batch) for batch in itertools.islice(stream, config.batches)]
    dtype = jnp.dtype(plan.config.dtype)
    say(f'calibrating on {config.batches * config.batch_size * config.context:,} tokens')
    sums = place.on_host(importance.accumulate(params, batches, parent, dtype))
    ranking: tuple[int, ...] = ()
    depths = [choices.widths[-1] for choices in plan.grid if choices.axis == 'layers']
    depths += [arch.layers for arch in plan.by_hand.values()]
    if config.layer_batches and depths and min(depths) < parent.layers:
        say('ranking the layers')
        ranking, _ = importance.rank_layers(params, batches[: config.layer_batches], parent, min(depths), dtype)
    scores = importance.scores(sums, parent, plan.layout)
    if config.order == 'random':
        rng = np.random.default_rng(plan.config.seed)
        scores = jax.tree.map(lambda score: rng.random(score.shape), scores)
        ranking = tuple(rng.permutation(ranking).tolist())
    ordering = make_ordering(scores, parent, ranking)
    reordered = place.make(lambda p: apply_ordering(p, ordering, parent, plan.layout, plan.layout), params)
    return reordered, ordering, dataclasses.replace(parent, ranking=ranking)
