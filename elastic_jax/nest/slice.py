"""The core of the project: cutting a submodel's parameters out of its parent's."""

from __future__ import annotations

from typing import Any

import jax

from elastic_jax.arch import Arch
from elastic_jax.errors import UserError
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.params import Param, leaves, param_table


def slice_params(params: dict[str, Any], parent: Arch, child: Arch, layout: Layout = FLAT) -> dict[str, Any]:
    """The parameters of `child`, cut from those of `parent`: pure, differentiable, static shapes.

    Args:
      params: group -> name -> leaf. Leaves may be JAX or numpy arrays, ShapeDtypeStructs (their sharding is kept), or
        shardings (returned as they are: a prefix of an inner dimension keeps its partition).
    Raises: UserError when `child` does not nest in `parent`, breaks the layout, or a leaf has another shape than declared.
    """
    problem = child.why_not_nested(parent)
    if problem:
        raise UserError(problem)
    full = param_table(parent, layout.check(parent))
    small = param_table(child, layout.check(child))
    result: dict[str, dict[str, Any]] = {group: {} for group in small}
    for group, name, param in leaves(small):
        result[group][name] = slice_leaf(params[group][name], full[group][name], param, f'{group}/{name}')
    return result


def insert_params(
    params: dict[str, Any], child_params: dict[str, Any], parent: Arch, child: Arch, layout: Layout = FLAT
) -> dict[str, Any]:
    """The inverse of `slice_params`: the parent's parameters with those of `child` in their place."""
    slice_params(params, parent, child, layout)  # raises where they do not fit
    result = {group: dict(leaves) for group, leaves in params.items()}
    for group, own in child_params.items():
        for name, leaf in own.items():
            result[group][name] = params[group][name].at[tuple(slice(size) for size in leaf.shape)].set(leaf)
    return result


def slice_leaf(leaf: Any, full: Param, small: Param, name: str, flat: bool = False) -> Any:
    """The leading corner of one parameter. Raises UserError when the leaf is not of the full shape.

    flat: where only its first or its last dimension is cut, it is cut as a matrix, in whose form a step fetches and uses it; XLA
    would cut several dimensions in a layout of their own.
    """
    if isinstance(leaf, jax.sharding.Sharding):
        return leaf
    if tuple(leaf.shape) != full.shape:
        raise UserError(f'parameter {name} has shape {tuple(leaf.shape)}, but the parent declares {full.shape}')
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(small.shape, leaf.dtype, sharding=leaf.sharding)
    if small.shape == full.shape:
        return leaf
    cut = [dim for dim, size in enumerate(small.shape) if size != full.shape[dim]]
    if flat and cut == [0]:
        return leaf.reshape(len(leaf), -1)[: small.shape[0]].reshape(small.shape)
    if flat and cut == [leaf.ndim - 1]:
        return leaf.reshape(-1, leaf.shape[-1])[:, : small.shape[-1]].reshape(small.shape)
    return leaf[tuple(slice(size) for size in small.shape)]
