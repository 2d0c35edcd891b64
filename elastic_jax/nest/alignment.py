"""Widths that are no whole number of the chip's tiles, and what computing them padded costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from elastic_jax.arch import AXES, Arch
from elastic_jax.cost import flops_per_token
from elastic_jax.layout import Layout
from elastic_jax.nest.budgets import CHANNELS


@dataclasses.dataclass(frozen=True)
class Misaligned:
    """One width of a budget.

    Attributes:
      tile: what it should be a multiple of: the chip's tile, times G where the axis is blocked.
      aligned: the next width that is.
      extra_flops: what the budget's forward pass would compute with `aligned`, over what it needs, less 1. A matmul unit
        computes at least that; relayout copies of slices come on top, and are among a compiled program's cycles.
    """

    budget: str
    axis: str
    width: int
    tile: int
    aligned: int
    extra_flops: float

    def __str__(self) -> str:
        return (
            f'{self.budget}: {self.axis}={self.width} is no multiple of {self.tile}, so it costs what {self.aligned} does '
            f'({self.extra_flops:+.1%} of its FLOPs, and copies)'
        )

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def misaligned(archs: Mapping[str, Arch], layout: Layout, context: int, tile: int) -> tuple[Misaligned, ...]:
    """The widths of channels in every budget that are no multiple of the tile (config.choice_multiple), each of them once."""
    found = []
    for budget, arch in archs.items():
        needed = flops_per_token(arch, context)
        for axis in (axis for axis in arch.axes() if axis.name in CHANNELS):
            own = {None: arch.embed} if axis.kind is None else arch.layer_widths(axis.name)
            for width in sorted({width for width in own.values() if width}, reverse=True):
                blocks = [i for i, w in own.items() if w == width]
                step = tile * max((layout.blocks(axis.name, arch.mixers[i]) for i in blocks if i is not None), default=1)
                aligned = -(-width // step) * step
                if aligned != width:
                    padded = flops_per_token(_widened(arch, axis.name, blocks, aligned), context)
                    found.append(Misaligned(budget, axis.name, width, step, aligned, padded / needed - 1))
    return tuple(found)


def _widened(arch: Arch, axis_name: str, blocks: list[int | None], width: int) -> Arch:
    """The Arch with one width changed, which need not nest in anything."""
    axis = AXES[axis_name]
    if axis.kind is None:
        return dataclasses.replace(arch, **{axis.field: width})
    mixers = [dataclasses.replace(mixer, **{axis.field: width}) if i in blocks else mixer for i, mixer in enumerate(arch.mixers)]
    return dataclasses.replace(arch, mixers=tuple(mixers))
