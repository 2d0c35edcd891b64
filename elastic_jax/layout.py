"""Layout: how an axis that tensor or expert parallelism may shard is stored, as two dimensions (G, n/G).

Importance rank r lives at (r mod G, r div G), so a prefix of the ranks is the same prefix of the inner dimension in each of
the G blocks: local to every shard, balanced for every mesh size that divides G, and one plain slice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from elastic_jax.arch import Arch, Mixer, MoE, exact_divide, layer_axes
from elastic_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Layout:
    """G of every blocked axis: the largest tensor- or expert-parallel size the checkpoint is meant for."""

    mlp: int = 1
    shared_width: int = 1
    experts: int = 1
    kv_heads: int = 1

    def blocks(self, axis_name: str, mixer: Mixer) -> int:
        """G of one axis of one block. Experts that are routed in groups are blocked by those groups."""
        if axis_name == 'experts' and isinstance(mixer, MoE) and mixer.groups > 1:
            return mixer.groups
        return getattr(self, axis_name, 1)

    def check(self, arch: Arch) -> Layout:
        """Returns self if G divides every blocked width of `arch`, else raises UserError."""
        for axis in layer_axes():
            for i, width in arch.layer_widths(axis.name).items():
                blocks = self.blocks(axis.name, arch.mixers[i])
                if width % blocks:
                    down, up = width // blocks * blocks, -(-width // blocks) * blocks
                    nearest = f'{down} or {up}' if down else up
                    raise UserError(f"{axis.name}@{i}={width} is not a multiple of the layout's G={blocks}; take {nearest}")
        return self

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)


FLAT = Layout()


def inner_width(layout: Layout, axis_name: str, mixer: Mixer, width: Any) -> Any:
    """The size of the dimension that a slice cuts: n/G of a blocked axis, heads per group of Mamba, else the width."""
    if axis_name == 'mamba_heads':
        return exact_divide(width, mixer.groups)
    return exact_divide(width, layout.blocks(axis_name, mixer))


def to_blocked(x: np.ndarray, blocks: int, axis: int = 0) -> np.ndarray:
    """Splits the rank-ordered `axis` (n) into two dimensions (G, n/G)."""
    shape = x.shape
    split = x.reshape(*shape[:axis], shape[axis] // blocks, blocks, *shape[axis + 1 :])
    return split.swapaxes(axis, axis + 1)


def to_ranked(x: np.ndarray, axis: int = 0) -> np.ndarray:
    """Merges the two dimensions (G, n/G) at `axis` into one of n in rank order: the inverse of `to_blocked`."""
    shape = x.shape
    return x.swapaxes(axis, axis + 1).reshape(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
