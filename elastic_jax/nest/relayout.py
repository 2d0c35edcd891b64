"""Between layouts: a leaf in rank order, and back in the blocks of another layout."""

from __future__ import annotations

from typing import Any

from elastic_jax.arch import Arch, Mixer, MoE
from elastic_jax.layout import Layout, to_blocked, to_ranked
from elastic_jax.model.params import Param, layer_name, map_table, param_table


def ranked_shape(param: Param) -> tuple[int, ...]:
    """The leaf's shape with the two dimensions of its blocked axis, if it has one, merged."""
    at = _blocked_axis(param)
    return param.shape if at is None else (*param.shape[:at], param.shape[at] * param.shape[at + 1], *param.shape[at + 2 :])


def rank_order(leaf: Any, param: Param, mixer: Mixer | None) -> Any:
    """The leaf with its blocked axis in rank order; routing groups stay contiguous."""
    at = _blocked_axis(param)
    if at is None:
        return leaf
    return leaf.reshape(ranked_shape(param)) if is_routed(param, at, mixer) else to_ranked(leaf, at)


def block_order(leaf: Any, param: Param, mixer: Mixer | None) -> Any:
    """The inverse of `rank_order`; of a numpy array, a view."""
    at = _blocked_axis(param)
    if at is None:
        return leaf
    return leaf.reshape(param.shape) if is_routed(param, at, mixer) else to_blocked(leaf, param.shape[at], at)


def relayout(params: dict[str, Any], arch: Arch, old: Layout, new: Layout) -> dict[str, Any]:
    """The parameters of `arch`, stored in layout `old`, in layout `new`. Raises UserError when `new` does not divide it."""
    before, after = param_table(arch, old.check(arch)), param_table(arch, new.check(arch))
    result: dict[str, dict[str, Any]] = map_table(lambda _: None, after)
    mixers = {layer_name(i): mixer for i, mixer in enumerate(arch.mixers)}
    for group, named in after.items():
        for name, param in named.items():
            ranked = rank_order(params[group][name], before[group][name], mixers.get(group))
            result[group][name] = block_order(ranked, param, mixers.get(group))
    return result


def _blocked_axis(param: Param) -> int | None:
    return next((at for at, axis in enumerate(param.axes) if axis.endswith('_blocks')), None)


def is_routed(param: Param, at: int, mixer: Mixer | None) -> bool:
    """Whether the dimension `at` is that of routing groups, whose experts stay together in rank order."""
    return param.axes[at] == 'experts_blocks' and isinstance(mixer, MoE) and mixer.groups > 1
