"""What an Arch costs, in closed form: parameters, bytes, FLOPs; differentiable in the widths.

Counts are products of the shapes in the table of parameters, so they hold for expected (fractional, traced) widths too: build
such an Arch with `dataclasses.replace`, without `check()`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from elastic_jax.arch import Arch, Attention, Mamba, Mixer, MoE
from elastic_jax.model.params import Table, layer_name, param_table

Keep = Sequence[Any] | None


def _group_counts(table: Table) -> dict[str, dict[str, Any]]:
    return {group: {name: math.prod(param.shape) for name, param in params.items()} for group, params in table.items()}


def _active(mixer: Mixer, counts: dict[str, Any]) -> Any:
    """Parameters of one block that a token uses: of the experts, the top k."""
    total = sum(counts.values())
    if not isinstance(mixer, MoE):
        return total
    experts = sum(count for name, count in counts.items() if name.startswith('expert_'))
    return total - experts + experts * mixer.top_k / mixer.experts


def _sum(arch: Arch, keep: Keep, active: bool) -> Any:
    counts = _group_counts(param_table(arch))
    total = sum(sum(own.values()) for group, own in counts.items() if not group.startswith('layer_'))
    for i, mixer in enumerate(arch.mixers):
        if mixer is not None:
            own = counts[layer_name(i)]
            total += (1.0 if keep is None else keep[i]) * (_active(mixer, own) if active else sum(own.values()))
    return total


def parameters(arch: Arch, keep: Keep = None) -> Any:
    """All parameters. `keep` weighs each block by the share of it that is kept (the depth router)."""
    return _sum(arch, keep, active=False)


def active_parameters(arch: Arch, keep: Keep = None) -> Any:
    """Parameters that one token uses: top-k experts, everything else; both embedding matrices are counted."""
    return _sum(arch, keep, active=True)


def weight_bytes(arch: Arch, bytes_per_param: float = 2.0, keep: Keep = None) -> Any:
    return bytes_per_param * parameters(arch, keep)


def kv_bytes(arch: Arch, context: int, bytes_per_value: float = 2.0, keep: Keep = None) -> Any:
    """Bytes of the attention cache of one sequence of `context` tokens."""
    per_token = sum(
        (1.0 if keep is None else keep[i]) * 2 * mixer.kv_heads * mixer.head_dim
        for i, mixer in enumerate(arch.mixers)
        if isinstance(mixer, Attention)
    )
    return per_token * context * bytes_per_value


def ssm_bytes(arch: Arch, bytes_per_value: float = 2.0, keep: Keep = None) -> Any:
    """Bytes of the Mamba caches of one sequence: the convolutions' windows, and the state in float32."""
    total = 0.0
    for i, mixer in enumerate(arch.mixers):
        if isinstance(mixer, Mamba):
            channels = mixer.heads * mixer.head_dim
            window = (mixer.conv - 1) * (channels + 2 * mixer.groups * mixer.state) * bytes_per_value
            total += (1.0 if keep is None else keep[i]) * (window + 4 * channels * mixer.state)
    return total


def memory_bytes(
    arch: Arch, context: int, batch: int = 1, bytes_per_param: float = 2.0, bytes_per_value: float = 2.0, keep: Keep = None
) -> Any:
    """Bytes to serve: weights, and the caches of `batch` sequences of `context` tokens."""
    caches = kv_bytes(arch, context, bytes_per_value, keep) + ssm_bytes(arch, bytes_per_value, keep)
    return weight_bytes(arch, bytes_per_param, keep) + batch * caches


def block_flops(mixer: Mixer, counts: dict[str, Any], context: int, causal: bool = True) -> Any:
    """Forward matmul FLOPs per token of one block; `counts` are its parameters by name.

    `causal` counts half of the attention's rectangle, the other half being masked.
    """
    not_matmul = ('norm', 'gated_norm', 'a_log', 'd', 'correction_bias', 'q_norm', 'k_norm')
    matmul = {name: n for name, n in counts.items() if name not in not_matmul and not name.endswith('bias')}
    if isinstance(mixer, Mamba):
        matmul = {name: n for name, n in matmul.items() if not name.startswith('conv_')}
    flops = 2 * _active(mixer, matmul)
    if isinstance(mixer, Attention):
        flops += 4 * mixer.kv_heads * mixer.query_heads * mixer.head_dim * context * (0.5 if causal else 1.0)
    if isinstance(mixer, Mamba):
        chunk, channels = min(mixer.chunk, context), mixer.heads * mixer.head_dim
        flops += 2 * chunk * (mixer.groups * mixer.state + channels) + 4 * channels * mixer.state
    return flops


def flops_per_token(arch: Arch, context: int, causal: bool = True) -> Any:
    """Forward matmul FLOPs per token of a sequence of `context` tokens, unembedding included."""
    counts = _group_counts(param_table(arch))
    total = 2 * arch.vocab * arch.embed
    for i, mixer in enumerate(arch.mixers):
        if mixer is not None:
            total += block_flops(mixer, counts[layer_name(i)], context, causal)
    return total


def lockstep_flops_per_token(parent: Arch, budgets: Sequence[Arch], context: int, causal: bool = True) -> Any:
    """Matmul FLOPs per token of one elastic step: the teacher's forward pass once, forward and backward of every budget.

    The fused head makes each budget's gradients from logits at hand: one forward and two gradient products, as elsewhere.
    """
    return flops_per_token(parent, context, causal) + 3 * sum(flops_per_token(arch, context, causal) for arch in budgets)


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs. Bytes are in bfloat16, caches for one sequence of `context` tokens, FLOPs forward per token."""

    parameters: int
    active_parameters: int
    bytes: int
    kv_bytes: int
    ssm_bytes: int
    flops_per_token: int
    context: int

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def cost_of(arch: Arch, context: int = 4096) -> Cost:
    """The Cost of an Arch at a context length."""
    figures = (
        parameters(arch),
        active_parameters(arch),
        weight_bytes(arch),
        kv_bytes(arch, context),
        ssm_bytes(arch),
        flops_per_token(arch, context),
    )
    return Cost(*(round(figure) for figure in figures), context)
