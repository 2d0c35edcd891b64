"""The map between our leaves and Hugging Face's tensors, tensor by tensor in both directions.

A family declares which leaves each tensor holds, in row order (`Names`); shapes, transposes and expert indices follow from
the table of parameters, since a Hugging Face linear weight is [out, in] and ours is [in, out...], but for the experts' and the
embedding table. Files are flat in rank order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from elastic_jax.arch import Arch, Mixer, MoE
from elastic_jax.errors import UserError
from elastic_jax.layout import Layout
from elastic_jax.model.params import Param, Table, layer_name, leaves, param_table
from elastic_jax.nest.relayout import is_routed

PLAIN = {2: np.uint16, 4: np.uint32}
BLOCK_BYTES = 1 << 20  # of what is transposed at a time: it stays in the cache until it is used


@dataclasses.dataclass(frozen=True)
class Names:
    """What a family's tensors are called and hold.

    Attributes:
      top: tensor name -> 'group/leaf'.
      blocks: kind of mixer -> tensor name with {layer} and perhaps {expert} -> the leaves it holds, in row order. A tensor
        whose leaves the Arch does not have is not there.
      blocks_per_layer: how many of our blocks make one of their layers.
      tied_copy: the tensor in which a tied unembedding is written again, where transformers does not tie the family.
    """

    top: Mapping[str, str]
    blocks: Mapping[type[Mixer], Mapping[str, tuple[str, ...]]]
    blocks_per_layer: int = 1
    tied_copy: str = ''


@dataclasses.dataclass(frozen=True)
class Piece:
    """`rows` rows of a Hugging Face tensor, from `start` on, are one leaf (or one expert of it)."""

    group: str
    leaf: str
    start: int
    rows: int
    expert: int | None = None


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One tensor of a Hugging Face checkpoint, and the leaves it holds."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def hf_tensors(arch: Arch, names: Names, layout: Layout) -> list[HFTensor]:
    """Every tensor of the Hugging Face checkpoint of `arch`; tensors that hold the same leaf follow each other.

    Raises: UserError when the family has no place for one of the leaves.
    """
    table = param_table(arch, layout)
    tensors = []
    for name, path in names.top.items():
        group, leaf = path.split('/')
        if leaf in table.get(group, {}):
            tensors.append(_tensor(name, table, group, (leaf,), None))
    kept = [i for i, mixer in enumerate(arch.mixers) if mixer is not None]
    for position, i in enumerate(kept):
        mixer, group, layer = arch.mixers[i], layer_name(i), position // names.blocks_per_layer
        for template, held in names.blocks.get(type(mixer), {}).items():
            if all(leaf in table[group] for leaf in held):
                experts = range(mixer.experts) if '{expert}' in template else (None,)
                tensors += [_tensor(template.format(layer=layer, expert=e), table, group, held, e) for e in experts]
    placed = {(piece.group, piece.leaf) for tensor in tensors for piece in tensor.pieces}
    homeless = [f'{group}/{leaf}' for group, leaf, _ in leaves(table) if (group, leaf) not in placed]
    if homeless:
        raise UserError(f'the Hugging Face format of this family has no place for {homeless[0]}; export another model')
    return tensors


def tied_copy(arch: Arch, names: Names, layout: Layout) -> list[HFTensor]:
    """The embedding table under its second name, if this model needs it."""
    if not (arch.tied and names.tied_copy):
        return []
    return [_tensor(names.tied_copy, param_table(arch, layout), 'embedding', ('table',), None)]


def sources(tensors: Sequence[HFTensor]) -> dict[tuple[str, str], list[tuple[HFTensor, Piece]]]:
    """(group, leaf) -> the tensors and pieces it is made of."""
    result: dict[tuple[str, str], list[tuple[HFTensor, Piece]]] = {}
    for tensor in tensors:
        for piece in tensor.pieces:
            result.setdefault((piece.group, piece.leaf), []).append((tensor, piece))
    return result


def _tensor(name: str, table: Table, group: str, held: tuple[str, ...], expert: int | None) -> HFTensor:
    pieces, start, tail = [], 0, ()
    for leaf in held:
        param = table[group][leaf]
        axes, shape = _own_dims(param, expert is not None)
        if not _is_transposed(axes, param):
            rows, tail = (shape[0], shape[1:]) if _is_matrix(axes) else (math.prod(shape), ())
        elif axes[-1] == 'embed':
            rows, tail = shape[-1], (math.prod(shape[:-1]),)
        else:  # A depthwise convolution has one input channel per output.
            rows, tail = math.prod(shape[1:]), (1, shape[0]) if axes[0] == 'conv' else (shape[0],)
        pieces.append(Piece(group, leaf, start, rows, expert))
        start += rows
    return HFTensor(name, (start, *tail), tuple(pieces))


def _own_dims(param: Param, per_expert: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
    skip = 2 if per_expert else 0
    return param.axes[skip:], param.shape[skip:]


def _is_matrix(axes: tuple[str, ...]) -> bool:
    return len(axes) > 1 and ('embed' in (axes[0], axes[-1]) or axes[0] == 'conv')


def _is_transposed(axes: tuple[str, ...], param: Param) -> bool:
    """Whether the tensor is the leaf's transpose: every matrix but those that read the embedding along their last dimension
    (they do not produce it, so its mask is not theirs) and the table, which is [vocab, embed] in both.
    """
    reads_last = axes[-1] == 'embed' and 'embed' not in param.mask
    return _is_matrix(axes) and axes[0] != 'vocab' and not reads_last


def expert_index(param: Param, mixer: MoE, expert: int) -> tuple[int, int]:
    """Where expert `expert` of the Hugging Face checkpoint lies in a leaf [G, E/G, ...]."""
    blocks, inner = param.shape[:2]
    return divmod(expert, inner) if mixer.groups > 1 else (expert % blocks, expert // blocks)


def as_rows(leaf: np.ndarray, param: Param, piece: Piece) -> np.ndarray:
    """A view of a leaf (or expert) in rank order as Hugging Face's rows: [rows, columns], or [rows] of a vector."""
    axes = piece_axes(param, piece)
    if not _is_transposed(axes, param):
        return leaf if _is_matrix(axes) else leaf.reshape(-1)
    if axes[-1] == 'embed':
        return leaf.reshape(-1, leaf.shape[-1]).T
    return leaf.reshape(leaf.shape[0], -1).T


def piece_axes(param: Param, piece: Piece) -> tuple[str, ...]:
    """The axis names of what a piece holds, blocked axes merged."""
    axes, _ = _own_dims(param, piece.expert is not None)
    return tuple(axis for axis in axes if not axis.endswith('_blocks'))


def cut_axis(param: Param, mixer: Mixer | None, per_expert: bool) -> int:
    """The axis of a leaf along which parts of it are experts, or rows, that follow each other in the Hugging Face tensors."""
    if per_expert:
        return 1
    transposed = _is_transposed(param.axes, param)
    if transposed and param.axes[-1] == 'embed':
        return len(param.axes) - 1
    first = 1 if transposed else 0
    # Ranks go round the blocks, so those of a part lie inside it; with routing groups they follow the blocks.
    return first + (param.axes[first].endswith('_blocks') and not is_routed(param, first, mixer))


def part_of(param: Param, index: tuple[slice, ...]) -> Param:
    """The description of a part of a leaf."""
    return dataclasses.replace(param, shape=tuple(cut.stop - cut.start for cut in index))


def copy_rows(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source for matrices of which one may be a transposed view, about a megabyte at a time."""
    if target.ndim == 2 and source.flags.c_contiguous:
        target, source = target.T, source.T
    target[...] = row_major(source)


def row_major(matrix: np.ndarray) -> np.ndarray:
    """The matrix in row order, a copy if it is a transposed view. XLA transposes three times as fast as numpy."""
    if matrix.ndim != 2 or matrix.flags.c_contiguous or matrix.dtype.itemsize not in PLAIN:
        return np.ascontiguousarray(matrix)
    plain = PLAIN[matrix.dtype.itemsize]  # the bits as they are
    copy = np.asarray(jax.device_put(matrix.view(plain), jax.local_devices(backend='cpu')[0]))
    return copy.view(matrix.dtype)
