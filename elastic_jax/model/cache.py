"""The decoder with caches: attention keys and values, convolution windows, SSM states; any chunk of tokens at a time.

Rows of a batch have lengths of their own. A chunk is padded on the right: `valid_B` says how many of its tokens are real, and
the others leave no trace, so prompts of unequal length share a batch and a chunk can be run again from a saved cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elastic_jax.arch import Arch, Attention, Mamba
from elastic_jax.model.attention import init_kv_cache
from elastic_jax.model.context import Context
from elastic_jax.model.decoder import apply_block, embed_tokens, final_norm, unembed
from elastic_jax.model.mamba import MambaCache, init_mamba_cache, settle
from elastic_jax.model.params import layer_name


class Cache(NamedTuple):
    """Caches of all blocks by name, and how many tokens each row holds."""

    length_B: jax.Array
    blocks: dict[str, Any]


def init_cache(arch: Arch, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `slots` tokens a row. Writing past the last slot is the caller's error."""
    blocks = {}
    for i, mixer in enumerate(arch.mixers):
        if isinstance(mixer, Attention):
            blocks[layer_name(i)] = init_kv_cache(mixer, batch, slots, dtype)
        elif isinstance(mixer, Mamba):
            blocks[layer_name(i)] = init_mamba_cache(mixer, batch, dtype)
    return Cache(jnp.zeros(batch, jnp.int32), blocks)


def recurrent_blocks(cache: Cache) -> dict[str, MambaCache]:
    """The caches that cannot be shortened: a Mamba block's state holds all its tokens in one."""
    return {name: block for name, block in cache.blocks.items() if isinstance(block, MambaCache)}


def rewind(cache: Cache, length_B: jax.Array, recurrent: dict[str, MambaCache]) -> Cache:
    """The cache as it was when rows held `length_B` tokens and its recurrent blocks were `recurrent`.

    Keys and values past a row's length are never looked at, and are written over.
    """
    return Cache(length_B, {**cache.blocks, **recurrent})


def settle_cache(arch: Arch, cache: Cache, kept_B: jax.Array) -> Cache:
    """The cache after the first `kept_B` tokens of a chunk that was run as a trial."""
    blocks = dict(cache.blocks)
    for i, mixer in enumerate(arch.mixers):
        if isinstance(mixer, Mamba):
            _, blocks[layer_name(i)] = settle(blocks[layer_name(i)], kept_B, mixer)
    return Cache(cache.length_B + kept_B, blocks)


def cached_hidden_states(
    params: dict[str, Any],
    tokens_BxT: jax.Array,
    arch: Arch,
    cache: Cache,
    valid_B: jax.Array,
    dtype: Any = jnp.float32,
    trial: bool = False,
) -> tuple[jax.Array, Cache]:
    """(final hidden states [B, T, D], the cache after the chunk's real tokens).

    As a trial the cache is for `settle_cache` alone, which says how many of the tokens stay.
    """
    positions_BxT = cache.length_B[:, None] + jnp.arange(tokens_BxT.shape[1])[None]
    context = Context(positions_BxT, None, valid_B, cache.length_B, trial, arch.norm_eps, dtype=dtype)
    x_BxTxD, blocks = embed_tokens(params, tokens_BxT, dtype), {}
    for i, mixer in enumerate(arch.mixers):
        if mixer is None:
            continue
        name = layer_name(i)
        x_BxTxD, block_cache, *_ = apply_block(params[name], x_BxTxD, mixer, context, cache.blocks.get(name))
        if block_cache is not None:
            blocks[name] = block_cache
    length_B = cache.length_B if trial else cache.length_B + valid_B
    return final_norm(params, x_BxTxD, context), Cache(length_B, blocks)


def cached_logits(
    params: dict[str, Any],
    tokens_BxT: jax.Array,
    arch: Arch,
    cache: Cache,
    valid_B: jax.Array,
    dtype: Any = jnp.float32,
    trial: bool = False,
) -> tuple[jax.Array, Cache]:
    """(logits [B, T, V] in float32, the cache after the chunk's real tokens); arguments as of `cached_hidden_states`."""
    hidden_BxTxD, cache = cached_hidden_states(params, tokens_BxT, arch, cache, valid_B, dtype, trial)
    return unembed(params, hidden_BxTxD, dtype), cache
