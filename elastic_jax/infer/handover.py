"""Handing the cache of one size to another, instead of computing it again.

Nested sizes have caches of nested shapes. What both have is handed over as it is; what only the giver has is dropped; what only
the taker has is filled by a stated rule:
  zero  missing KV heads, Mamba heads and Mamba channels start empty, as at the beginning of a sequence
  mean  they take the mean of those that are there, in their layer and group
A layer that the giver dropped starts empty under both rules. What is handed over was computed from a narrower residual stream,
so it approximates what the taker would have computed; computing it again is exact.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.arch import Arch, Attention
from elastic_jax.errors import UserError
from elastic_jax.infer.resident import Weights
from elastic_jax.layout import Layout
from elastic_jax.model.cache import Cache, init_cache
from elastic_jax.model.params import layer_name

FILLS = ('zero', 'mean')


def hand_over(cache: Cache, giver: Arch, taker: Weights, slots: int, fill: str = 'zero') -> Cache:
    """The giver's cache in the shapes of the taker's, with room for `slots` tokens. Raises UserError for an unknown rule."""
    if fill not in FILLS:
        raise UserError(f'fill={fill!r} is not a rule for missing heads; give one of {", ".join(FILLS)}')
    if taker.arch.nests_in(giver):
        fill = FILLS[0]  # nothing is missing: one program does for all rules
    return _hand_over(cache, giver, taker.arch, taker.layout, taker.dtype, slots, fill)


@partial(jax.jit, static_argnames=('giver', 'taker', 'layout', 'dtype', 'slots', 'fill'))
def _hand_over(cache: Cache, giver: Arch, taker: Arch, layout: Layout, dtype: Any, slots: int, fill: str) -> Cache:
    empty = init_cache(taker, cache.length_B.shape[0], slots, dtype)
    blocks = {}
    for i, mixer in enumerate(taker.mixers):
        name = layer_name(i)
        if name not in empty.blocks:
            continue
        if name not in cache.blocks:
            blocks[name] = empty.blocks[name]
            continue
        # KV heads are blocked: the taker's missing heads stand at the end of each block, not at the end of all.
        split = layout.blocks('kv_heads', mixer) if isinstance(mixer, Attention) else 1
        fit = lambda given, wanted, split=split: _fit(given, wanted.shape, split, fill).astype(wanted.dtype)
        blocks[name] = jax.tree.map(fit, cache.blocks[name], empty.blocks[name])
    return Cache(cache.length_B, blocks)


def _fit(given: jax.Array, shape: tuple[int, ...], split: int, fill: str) -> jax.Array:
    """`given` cut and filled to `shape`; axis 1 is in `split` blocks."""
    if split > 1:
        blocked = lambda sizes: (sizes[0], split, sizes[1] // split, *sizes[2:])
        return _fit(given.reshape(blocked(given.shape)), blocked(shape), 1, fill).reshape(shape)
    given = given[tuple(slice(min(have, want)) for have, want in zip(given.shape, shape, strict=True))]
    for axis, want in enumerate(shape):
        missing = want - given.shape[axis]
        if missing and fill == 'mean':
            mean = jnp.mean(given, axis=axis, keepdims=True)
            given = jnp.concatenate([given, jnp.repeat(mean, missing, axis=axis)], axis=axis)
        elif missing:
            given = jnp.pad(given, [(0, missing if axis == other else 0) for other in range(given.ndim)])
    return given
