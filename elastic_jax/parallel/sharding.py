"""What is split over which mesh axis: one set of rules, from which all shardings derive."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastic_jax.arch import Arch
from elastic_jax.errors import UserError
from elastic_jax.layout import Layout
from elastic_jax.model.collectives import Axes, Shards
from elastic_jax.model.fetch import Way
from elastic_jax.model.params import Param, leaves, map_table, param_table


@dataclasses.dataclass(frozen=True)
class Rules:
    """From a logical axis to the mesh axes that split it; an axis that does not divide it, or is used already, is left out.

    `stored` is how parameters are kept, along the first of these logical axes that they have and that it divides; they are
    gathered over it before use. The others split the computation too.
    """

    batch: Axes = ('replica', 'fsdp', 'expert')
    vocab: Axes = ('tensor',)
    mlp_blocks: Axes = ('tensor',)
    shared_width_blocks: Axes = ('tensor',)
    kv_heads_blocks: Axes = ('tensor',)
    mamba_groups: Axes = ('tensor',)
    experts_blocks: Axes = ('expert', 'tensor')
    # Whole experts are contiguous and always tile-aligned. Split along embed, the TPU compiler copies the experts into another
    # layout at every gather, and all-reduces their gradients at full size where a part is no multiple of 8. Words are looked up
    # as whole rows, which of a table that is split along embed would first have to be put together.
    stored: tuple[tuple[str, Axes], ...] = (
        ('experts_blocks', ('fsdp',)),
        ('vocab', ('fsdp',)),
        ('embed', ('fsdp', 'expert')),
    )


RULES = Rules()


def param_spec(param: Param, mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """How one parameter is stored."""
    entries: list[Axes] = [()] * len(param.axes)
    used: set[str] = set()

    def split(i: int, axes: Axes) -> None:
        for axis in axes:
            divisor = mesh.shape[axis] * math.prod(mesh.shape[other] for other in entries[i])
            if mesh.shape[axis] > 1 and axis not in used and param.shape[i] % divisor == 0:
                entries[i] += (axis,)
                used.add(axis)

    # What splits the computation first; storage takes what is left.
    for i, name in enumerate(param.axes):
        if not param.whole:
            split(i, getattr(rules, name, ()))
    for name, axes in rules.stored:
        if _stored_along(param, name):
            split(param.axes.index(name), axes)
    return PartitionSpec(*(entry or None for entry in entries))


def _stored_along(param: Param, name: str) -> bool:
    """Whether a parameter may be stored in parts of this axis: of another than embed only where it leads (an unembedding's
    vocabulary does not), and of vectors not at all: fetching them would cost more than they do.
    """
    if name == 'embed':
        return name in param.axes and len(param.shape) > 1
    return param.axes[0] == name and not param.whole


def fetch_ways(param: Param, spec: PartitionSpec, rules: Rules = RULES) -> tuple[Way, ...]:
    """How a parameter is gathered before use: one way for each of its dimensions that is stored in parts."""
    found = []
    for name, axes in rules.stored:
        if _stored_along(param, name):
            dim, computed = param.axes.index(name), () if param.whole else getattr(rules, name, ())
            parts = tuple(axis for axis in spec_axes(spec, dim) if axis in axes and axis not in computed)
            # What is used in place is many matrices, each whole.
            found.append(Way(parts, dim, matrix=not param.in_place))
    return tuple(way for way in found if way.axes)


def spec_axes(spec: PartitionSpec, dim: int) -> Axes:
    entry = spec[dim] if dim < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def param_specs(arch: Arch, layout: Layout, mesh: Mesh) -> dict[str, dict[str, PartitionSpec]]:
    """group -> name -> PartitionSpec of the parameters of `arch`; a slice has its parent's."""
    return map_table(lambda param: param_spec(param, mesh), param_table(arch, layout))


def param_shardings(arch: Arch, layout: Layout, mesh: Mesh) -> dict[str, dict[str, NamedSharding]]:
    """group -> name -> NamedSharding of the parameters of `arch`."""
    return map_table(lambda param: NamedSharding(mesh, param_spec(param, mesh)), param_table(arch, layout))


def tree_specs(tree: Any, specs: dict[str, dict[str, PartitionSpec]]) -> Any:
    """The PartitionSpec of every leaf of a tree that holds copies of the parameters (a training state, an optimiser's): under a
    path …/group/name that of the parameter, else that of what is whole everywhere.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        keys = [getattr(part, 'key', None) for part in path[-2:]]
        found = specs.get(keys[0], {}).get(keys[1]) if len(keys) == 2 else None
        return PartitionSpec() if found is None else found

    return jax.tree_util.tree_map_with_path(spec, tree)


def tree_shardings(tree: Any, specs: dict[str, dict[str, PartitionSpec]], mesh: Mesh) -> Any:
    """The NamedSharding of every leaf, as `tree_specs`."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree_specs(tree, specs), is_leaf=is_spec)


def batch_spec(mesh: Mesh, rules: Rules = RULES) -> PartitionSpec:
    """Of arrays [B, ...]."""
    return PartitionSpec(tuple(axis for axis in rules.batch if mesh.shape[axis] > 1) or None)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, ...]: their rows over every axis that splits data."""
    return NamedSharding(mesh, batch_spec(mesh))


def data_parallelism(mesh: Mesh, rules: Rules = RULES) -> int:
    """How many parts a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in rules.batch)


def shards(arch: Arch, layout: Layout, mesh: Mesh, rules: Rules = RULES) -> Shards:
    """What one device's part of `arch` is, for the blocks to know what to exchange."""
    split: dict[str, Axes] = {}
    for _, name, param in leaves(param_table(arch, layout)):
        spec = param_spec(param, mesh, rules)
        for dim, logical in enumerate(param.axes):
            if param.whole or not (computed := getattr(rules, logical, ())):
                continue
            axes = tuple(axis for axis in spec_axes(spec, dim) if axis in computed)
            if split.setdefault(logical, axes) != axes:
                raise UserError(f'{name}: blocks differ in how {logical} can be split over the mesh; take a smaller config.mesh')
    data = tuple(axis for axis in rules.batch if mesh.shape[axis] > 1)
    return Shards(data, tuple((name, axes) for name, axes in split.items() if axes))


def mesh_problems(arch: Arch, layout: Layout, mesh: Mesh) -> list[str]:
    """One sentence for each way in which `arch` does not fit on the mesh: T | G, and fsdp | embed."""
    problems, shape = [], mesh.shape
    if arch.embed % shape['fsdp']:
        down = max(size for size in range(1, shape['fsdp'] + 1) if arch.embed % size == 0)
        problems.append(f'embed={arch.embed} does not split over fsdp={shape["fsdp"]}; take config.mesh.fsdp={down}')
    table = param_table(arch, layout)
    wanted = {'mlp': 'tensor', 'shared_width': 'tensor', 'experts': 'expert'}
    sizes = {name: size for _, _, param in leaves(table) for name, size in zip(param.axes, param.shape, strict=True)}
    for name, axis in wanted.items():
        blocks = sizes.get(f'{name}_blocks', shape[axis])
        if blocks % shape[axis]:
            problems.append(
                f'{axis}={shape[axis]} does not divide the G={blocks} blocks of {name}; '
                f'set config.layout.{name} to a multiple of {shape[axis]}, or config.mesh.{axis} to a divisor of {blocks}'
            )
    if 'experts_blocks' not in sizes and shape['expert'] > 1:
        problems.append(f'config.mesh.expert={shape["expert"]}, but the model has no experts; use fsdp instead')
    return problems
