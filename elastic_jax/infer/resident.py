"""One resident set of parameters, from which every size decodes.

A size that is narrower than what is resident needs its slice as arrays of its own: taken inside a decoding step it would be
copied at every step. Slices are kept within a byte limit and the least recently used is let go of. A size for which the limit
has no room still runs: its programs cut the slice themselves, once for every piece of tokens.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from elastic_jax.arch import Arch
from elastic_jax.errors import UserError
from elastic_jax.layout import FLAT, Layout
from elastic_jax.nest.slice import slice_params


@partial(jax.tree_util.register_dataclass, data_fields=('params',), meta_fields=('stored', 'arch', 'layout', 'dtype', 'mesh'))
@dataclasses.dataclass(frozen=True)
class Weights:
    """A model to run, as an argument of a jitted program: parameters of the Arch `stored`, of which `arch` is computed with.

    `dtype` is that of the matmuls. `mesh` is what the parameters are split over, if they are; caches follow (`placed.py`).
    """

    params: Any
    stored: Arch
    arch: Arch
    layout: Layout
    dtype: Any
    mesh: Mesh | None = None

    def own(self) -> Any:
        """The parameters of `arch`; inside a program, cut there unless they are stored as such."""
        return slice_params(self.params, self.stored, self.arch, self.layout)


def weights_of(params: Any, arch: Arch, layout: Layout = FLAT, dtype: Any = jnp.float32) -> Weights:
    """A model whose parameters are its own."""
    return Weights(params, arch, arch, layout, jnp.dtype(dtype), mesh_of(params))


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters are split over; None when they are on one device."""
    sharding = getattr(next(iter(jax.tree.leaves(params)), None), 'sharding', None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


class Resident:
    """Parameters in memory once, and the slices in use.

    Args:
      params: of `arch`, on their devices, in the dtype to compute with.
      limit_bytes: how much all kept slices together may take beside the resident parameters; None: no limit.
    """

    def __init__(self, params: Any, arch: Arch, layout: Layout = FLAT, dtype: Any = jnp.float32, limit_bytes: int | None = None):
        if limit_bytes is not None and limit_bytes < 0:
            raise UserError(f'the byte limit of slices is {limit_bytes}; give 0 or more')
        self.params, self.arch, self.layout, self.dtype = params, arch, layout, jnp.dtype(dtype)
        self.limit_bytes, self.mesh = limit_bytes, mesh_of(params)
        self.evictions = 0
        self._slices: OrderedDict[Arch, Any] = OrderedDict()

    def weights(self, arch: Arch, beside: Collection[Arch] = ()) -> Weights:
        """A size to run; its slice is kept if it fits the limit. Raises UserError when `arch` does not nest.

        beside: sizes that are held while this one is. Their slices are not let go of: they would stay in memory, uncounted.
        """
        problem = arch.why_not_nested(self.arch)
        if problem:
            raise UserError(problem)
        if arch == self.arch:
            return self._weights(self.params, self.arch, self.arch)
        if arch not in self._slices:
            held = [params for other, params in self._slices.items() if other in beside]
            if self.limit_bytes is not None and self._kept_bytes([*held, self._abstract(arch)]) > self.limit_bytes:
                return self._weights(self.params, self.arch, arch)
            self._make_room(arch, beside)
            self._slices[arch] = self._cut(arch)
        self._slices.move_to_end(arch)
        return self._weights(self._slices[arch], arch, arch)

    def slice_bytes(self, arch: Arch) -> int:
        """What a slice takes by itself beside the resident parameters: leaves of full width are the resident ones."""
        return sum(_nbytes(leaf) for group, name, leaf in _named(self._abstract(arch)) if not self._whole(group, name, leaf))

    def report(self) -> dict[str, Any]:
        """Bytes: of the resident parameters, of all kept slices, the limit; and how many slices are kept and were let go of."""
        return {
            'resident_bytes': sum(_nbytes(leaf) for leaf in jax.tree.leaves(self.params)),
            'slices_bytes': self._kept_bytes(self._slices.values()),
            'limit_bytes': self.limit_bytes,
            'slices': len(self._slices),
            'evictions': self.evictions,
        }

    def _weights(self, params: Any, stored: Arch, arch: Arch) -> Weights:
        return Weights(params, stored, arch, self.layout, self.dtype, self.mesh)

    def _abstract(self, arch: Arch) -> Any:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.params)
        return slice_params(shapes, self.arch, arch, self.layout)

    def _whole(self, group: str, name: str, leaf: Any) -> bool:
        return tuple(leaf.shape) == tuple(self.params[group][name].shape)

    def _cut(self, arch: Arch) -> Any:
        """The slice; leaves that another kept slice has already are shared with it."""
        have = {(group, name, leaf.shape): leaf for params in self._slices.values() for group, name, leaf in _named(params)}
        cut = slice_params(self.params, self.arch, arch, self.layout)
        share = lambda group, leaves: {name: have.get((group, name, leaf.shape), leaf) for name, leaf in leaves.items()}
        return {group: share(group, leaves) for group, leaves in cut.items()}

    def _make_room(self, arch: Arch, beside: Collection[Arch]) -> None:
        for oldest in [other for other in self._slices if other not in beside]:
            if self.limit_bytes is None or self._kept_bytes([*self._slices.values(), self._abstract(arch)]) <= self.limit_bytes:
                return
            del self._slices[oldest]
            self.evictions += 1

    def _kept_bytes(self, slices: Any) -> int:
        """Bytes of several slices together; a leaf that several share counts once, a resident one not at all."""
        sizes = {
            (group, name, tuple(leaf.shape)): _nbytes(leaf)
            for params in slices
            for group, name, leaf in _named(params)
            if not self._whole(group, name, leaf)
        }
        return sum(sizes.values())


def _named(params: Any) -> Any:
    return ((group, name, leaf) for group, leaves in params.items() for name, leaf in leaves.items())


def _nbytes(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize
