"""Masks at full width: the differentiable form of a slice, and the reference that slices are tested against.

A mask multiplies parameters on the side that produces an axis, once per axis, as the table of parameters declares. With
0/1 prefix masks the masked parent computes exactly what the sliced submodel computes; soft masks mix prefixes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elastic_jax.arch import Arch, Mamba, Mixer, MoE, layer_axes
from elastic_jax.layout import FLAT, Layout, inner_width
from elastic_jax.model.context import Soft
from elastic_jax.model.params import layer_name, param_table


class Masks(NamedTuple):
    """Shares in [0, 1] along the dimension that a slice of each axis cuts.

    Attributes:
      embed_D: share of each embedding channel.
      blocks: block name -> axis name -> [inner width]; axes that are not named are kept whole.
      keep: block name -> share of the block; blocks that are not named are kept.
    """

    embed_D: jax.Array
    blocks: dict[str, dict[str, jax.Array]]
    keep: dict[str, Any]


def prefix_mask(size: int, width: Any) -> jax.Array:
    """1 for the first `width` of `size` entries, else 0."""
    return (jnp.arange(size) < width).astype(jnp.float32)


def axis_sizes(mixer: Mixer) -> dict[str, int]:
    """Axis name -> width, for every axis that a mixer has."""
    sizes = {axis.name: getattr(mixer, axis.field) for axis in layer_axes() if isinstance(mixer, axis.kind)}
    return {name: size for name, size in sizes.items() if size}


def hard_masks(parent: Arch, child: Arch, layout: Layout = FLAT) -> Masks:
    """The 0/1 masks under which the parent computes `child`."""
    blocks: dict[str, dict[str, jax.Array]] = {}
    keep: dict[str, float] = {}
    for i, (full, small) in enumerate(zip(parent.mixers, child.mixers, strict=True)):
        if full is None:
            continue
        keep[layer_name(i)] = 0.0 if small is None else 1.0
        kept = axis_sizes(small or full)
        blocks[layer_name(i)] = {
            name: prefix_mask(inner_width(layout, name, full, size), inner_width(layout, name, full, kept[name]))
            for name, size in axis_sizes(full).items()
        }
    return Masks(prefix_mask(parent.embed, child.embed), blocks, keep)


def mask_params(params: dict[str, Any], arch: Arch, masks: Masks, layout: Layout = FLAT) -> dict[str, Any]:
    """The parameters of `arch`, each multiplied by the masks of the axes that it produces."""
    masked = {}
    for group, table in param_table(arch, layout).items():
        shares = {'embed': masks.embed_D, **masks.blocks.get(group, {})}
        masked[group] = {}
        for name, param in table.items():
            leaf = params[group][name]
            for axis in param.mask:
                if axis in shares:
                    shape = [1] * leaf.ndim
                    shape[param.axes.index(axis)] = -1
                    leaf = leaf * shares[axis].reshape(shape).astype(leaf.dtype)
            masked[group][name] = leaf
    return masked


def softs(arch: Arch, masks: Masks, layout: Layout = FLAT) -> dict[str, Soft]:
    """What the masked forward pass needs beside the masked parameters: a Soft for each block and for `final_norm`."""
    embed_ratio = jnp.mean(masks.embed_D)
    result = {'final_norm': Soft(embed_ratio)}
    for i, mixer in enumerate(arch.mixers):
        if mixer is None:
            continue
        name = layer_name(i)
        shares = masks.blocks.get(name, {})
        gated_ratio, experts = 1.0, None
        if isinstance(mixer, Mamba):
            for axis in ('mamba_heads', 'mamba_head_dim'):
                gated_ratio = gated_ratio * (jnp.mean(shares[axis]) if axis in shares else 1.0)
        if isinstance(mixer, MoE) and 'experts' in shares:
            experts = jnp.broadcast_to(shares['experts'], (layout.blocks('experts', mixer), shares['experts'].shape[0]))
        result[name] = Soft(embed_ratio, gated_ratio, experts, masks.keep.get(name, 1.0))
    return result
