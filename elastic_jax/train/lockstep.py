"""All budgets of a step, layer by layer together.

Layers outside, budgets inside: a layer's weights are fetched once for all budgets, and every budget costs what its size costs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from elastic_jax.arch import Arch
from elastic_jax.cost import parameters
from elastic_jax.layout import FLAT, Layout
from elastic_jax.model.context import HARD, Context, Soft
from elastic_jax.model.decoder import apply_block, embed_tokens, final_norm, unembedding
from elastic_jax.model.fetch import Summed, Way, fetch, fetch_summed
from elastic_jax.model.losses import Students
from elastic_jax.model.params import Param, Table, layer_name, param_table
from elastic_jax.nest.slice import slice_leaf
from elastic_jax.parallel.sharding import fetch_ways
from elastic_jax.train.units import Segment, segments

Aux = dict[str, dict[str, jax.Array]]
Specs = dict[str, dict[str, PartitionSpec]]
Fetched = dict[str, jax.Array | Summed]  # what is used in place is a Summed
FETCHED = 'fetched'


@dataclasses.dataclass(frozen=True)
class Stack:
    """How a step runs through the layers.

    Attributes:
      layout: of the parameters.
      remat: each layer's activations are computed again in the backward pass, of which only the layer's inputs are kept.
      scan: repeated units of layers are one loop: compile time follows the distinct layers, not the depth.
      specs: how the parameters are stored over a mesh; None on one device.
    """

    layout: Layout = FLAT
    remat: bool = False
    scan: bool = False
    specs: Specs | None = None


def lockstep(
    params: dict[str, Any],
    tokens_BxT: jax.Array,
    parent: Arch,
    archs: Sequence[Arch],
    context: Context,
    stack: Stack,
    softs: Sequence[dict[str, Soft]] | None = None,
) -> tuple[Students, list[Aux]]:
    """(final hidden states [B, T, D'] of every budget with the parent's unembedding, each budget's aux by block).

    `params` are the parent's, as stored; gradients of the slices land in them by autodiff. `softs` holds, for each budget, what
    soft masks need beside masked parameters: a Soft for each block and for `final_norm`.
    """
    full, tables = param_table(parent, stack.layout), [param_table(arch, stack.layout) for arch in archs]
    held = full if stack.specs is None else _largest(full, tables)
    # In the backward pass the gradient of a parameter that is used in place begins with its last user's: the largest.
    order = sorted(range(len(archs)), key=lambda n: parameters(archs[n]))

    def fetched(group: str, leaves: dict[str, jax.Array]) -> Fetched:
        return _fetch_group(leaves, held[group], None if stack.specs is None else stack.specs[group], context.dtype)

    def cut(leaves: Fetched, group: str, n: int, last: bool = True) -> Fetched:
        declared = held[group]

        def own(name: str, leaf: jax.Array | Summed, param: Param) -> jax.Array | Summed:
            if param.in_place:
                return dataclasses.replace(leaf, last=last)
            return slice_leaf(leaf, _local(declared[name], leaf), _local(param, leaf), f'{group}/{name}', flat=True)

        return {name: own(name, leaves[name], param) for name, param in tables[n][group].items()}

    outside = {group: fetched(group, params[group]) for group in full if not group.startswith('layer_')}
    # Looked up once: a budget's rows are the leading part of the parent's, and the table is much larger than they.
    x_BxTxD = embed_tokens(outside, tokens_BxT, context.dtype, context.shards.of('vocab'))
    streams = [x_BxTxD[..., : arch.embed] for arch in archs]
    layers = [i for i in range(len(parent.mixers)) if any(arch.mixers[i] is not None for arch in archs)]

    def block(like: int, leaves: dict[str, jax.Array], soft: list[Soft] | None, inputs: list[jax.Array]) -> tuple[list, list]:
        """Every budget through one layer that has the shapes of layer `like`."""
        name = layer_name(like)
        whole = fetched(name, leaves)
        outputs, auxes, users = list(inputs), [{}] * len(archs), [n for n in order if archs[n].mixers[like] is not None]
        for n in users:
            own, mixer = cut(whole, name, n, last=n == users[-1]), archs[n].mixers[like]
            found = apply_block(own, inputs[n], mixer, context, None, soft[n] if soft else HARD)
            outputs[n], auxes[n] = found.y_BxTxD, found.aux
            whole |= found.summed
        return outputs, auxes

    keys = [(parent.mixers[i], *(arch.mixers[i] for arch in archs)) for i in layers]
    parts = segments(keys) if stack.scan else [Segment(j, 1, 1) for j in range(len(layers))]
    auxes: list[Aux] = [{} for _ in archs]
    for part in parts:
        indices = [layers[part.start : part.start + part.unit * part.repeats][j :: part.unit] for j in range(part.unit)]
        inputs = [[(params[layer_name(i)], softs and [soft[layer_name(i)] for soft in softs]) for i in same] for same in indices]
        blocks = [_remember(partial(block, same[0]), stack) for same in indices]
        streams, unit_auxes = _run_unit(blocks, inputs, streams)
        for same, by_repeat in zip(indices, unit_auxes, strict=True):
            for i, by_budget in zip(same, by_repeat, strict=True):
                for n, aux in enumerate(by_budget):
                    if archs[n].mixers[i] is not None:
                        auxes[n][layer_name(i)] = aux
    hiddens = []
    for n, x_BxTxD in enumerate(streams):
        norm = {'final_norm': cut(outside['final_norm'], 'final_norm', n)}
        hiddens.append(final_norm(norm, x_BxTxD, context, softs[n]['final_norm'].embed_ratio if softs else 1.0))
    return Students(tuple(hiddens), unembedding(outside)), auxes


def _run_unit(blocks: list[Callable[..., Any]], inputs: list[list[Any]], streams: list[jax.Array]) -> tuple[list, list]:
    """(streams, aux by layer of the unit, repeat, budget); the repeats are one scan when there are several."""
    repeats = len(inputs[0])
    if repeats == 1:
        auxes = []
        for run, [(leaves, soft)] in zip(blocks, inputs, strict=True):
            streams, aux = run(leaves, soft, streams)
            auxes.append([aux])
        return streams, auxes

    def unit(carry: list[jax.Array], stacked: list[Any]) -> tuple[list[jax.Array], list[Any]]:
        auxes = []
        for run, (leaves, soft) in zip(blocks, stacked, strict=True):
            carry, aux = run(leaves, soft, carry)
            auxes.append(aux)
        return carry, auxes

    stacked = [jax.tree.map(lambda *same: jnp.stack([jnp.asarray(leaf) for leaf in same]), *own) for own in inputs]
    streams, auxes = jax.lax.scan(unit, streams, stacked)
    return streams, [[jax.tree.map(lambda leaf, r=r: leaf[r], aux) for r in range(repeats)] for aux in auxes]


def _remember(run: Callable[..., Any], stack: Stack) -> Callable[..., Any]:
    """`run`, which keeps for its backward pass only its inputs, or all but the weights that it fetched."""
    if stack.remat:
        return jax.checkpoint(run)
    if stack.specs is not None:
        return jax.checkpoint(run, policy=jax.checkpoint_policies.save_anything_except_these_names(FETCHED))
    return run


def _largest(full: Table, tables: Sequence[Table]) -> Table:
    """What the budgets of a step need of each parameter among them: a step without the full budget fetches no more than its
    largest one. `embed` stays whole: what is gathered over it is a prefix only afterwards.
    """

    def largest(group: str, name: str, param: Param) -> Param:
        wanted = [table[group][name].shape for table in tables if group in table] or [param.shape]
        sizes = zip(param.axes, param.shape, *wanted, strict=True)
        return dataclasses.replace(param, shape=tuple(own if axis == 'embed' else max(more) for axis, own, *more in sizes))

    return {group: {name: largest(group, name, param) for name, param in params.items()} for group, params in full.items()}


def _fetch_group(
    leaves: dict[str, jax.Array], table: dict[str, Param], specs: dict[str, PartitionSpec] | None, dtype: Any
) -> Fetched:
    """The parameters of a group, as large as `table` says, from what is stored here of the parent's; None: all of it."""
    result = {}
    for name, leaf in leaves.items():
        param = table[name]
        whole = leaf[tuple(slice(size) for size in param.shape)]  # dimensions that are split over devices are shorter here
        own_dtype = leaf.dtype if param.float32 else dtype
        stored = () if specs is None else fetch_ways(param, specs[name])
        *before, last = stored or (Way(),)
        for way in before:
            whole = fetch(whole, way, own_dtype)
        whole = (fetch_summed if param.in_place else fetch)(whole, last, own_dtype)
        result[name] = jax.tree.map(partial(checkpoint_name, name=FETCHED), whole) if stored else whole
    return result


def _local(param: Param, leaf: jax.Array) -> Param:
    """The declaration of the part of a parameter that this device computes with: blocks (G) are split, widths never are."""
    shape = tuple(
        min(size, own) if axis.endswith('_blocks') or axis in ('mamba_groups', 'vocab') else size
        for axis, size, own in zip(param.axes, param.shape, leaf.shape, strict=True)
    )
    return dataclasses.replace(param, shape=shape)
