"""What an Arch costs, in closed form: parameters, bytes, FLOPs; differentiable in the widths.

Counts are products of the shapes in the table of parameters, so they hold for expected (fractional, traced) widths too: build
such an Arch with `dataclasses.replace`, without `check()`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from elastic_jax.arch import Arch, Attention, Mamba, Mixer, MoE
from elastic_jax.model.grouped import block_rows
from elastic_jax.model.params import Param, layer_name, param_table

Keep = Sequence[Any] | None

EXPERT = frozenset(('expert_up', 'expert_gate', 'expert_down'))
# Recomputing a block in the backward pass spares the matmuls that end it, as only the sum that they produce needs their result.
ENDS = frozenset(('o', 'out', 'down', 'shared_down', 'expert_down'))


def _size(params: dict[str, Param], chosen: Callable[[str, Param], bool] = lambda name, param: True) -> Any:
    return sum(math.prod(param.shape) for name, param in params.items() if chosen(name, param))


def _used(mixer: Mixer | None, params: dict[str, Param]) -> Any:
    """Parameters of one group that a token uses: of the experts, the top k."""
    if not isinstance(mixer, MoE):
        return _size(params)
    experts = _size(params, lambda name, param: name in EXPERT)
    return _size(params) - experts + experts * mixer.top_k / mixer.experts


def _blocks(arch: Arch) -> Iterator[tuple[int, Mixer, dict[str, Param]]]:
    table = param_table(arch)
    return ((i, mixer, table[layer_name(i)]) for i, mixer in enumerate(arch.mixers) if mixer is not None)


def _sum(arch: Arch, keep: Keep, measure: Callable[[Mixer | None, dict[str, Param]], Any]) -> Any:
    total = sum(measure(None, params) for group, params in param_table(arch).items() if not group.startswith('layer_'))
    for i, mixer, params in _blocks(arch):
        total += (1.0 if keep is None else keep[i]) * measure(mixer, params)
    return total


def parameters(arch: Arch, keep: Keep = None) -> Any:
    """All parameters. `keep` weighs each block by the share of it that is kept (the depth router)."""
    return _sum(arch, keep, lambda mixer, params: _size(params))


def active_parameters(arch: Arch, keep: Keep = None) -> Any:
    """Parameters that one token uses: of each MoE block's experts the top k, and everything else.

    Both the embedding table and the unembedding count whole: so do the published 3.58B and 2.08B (method.md §1).
    """
    return _sum(arch, keep, _used)


def weight_bytes(arch: Arch, bytes_per_param: float = 2.0, keep: Keep = None) -> Any:
    """Bytes of the parameters; those that the table keeps in float32 take four bytes each, whatever the others take."""
    return bytes_per_param * parameters(arch, keep) + max(0.0, 4.0 - bytes_per_param) * _sum(
        arch, keep, lambda mixer, table: _size(table, lambda name, param: param.float32)
    )


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


def block_flops(
    mixer: Mixer, params: dict[str, Param], context: int, executed_batch: int | None = None, spare: Collection[str] = ()
) -> Any:
    """Forward matmul FLOPs per token of one block, whose row of the table is `params`; without those named in `spare`.

    `executed_batch`: see `flops_per_token`.
    """
    flops = 0.0
    for name, param in params.items():
        # What maps the residual stream or makes it is a matmul; vectors, convolutions and biases are not.
        if 'embed' in param.axes and len(param.axes) > 1 and name not in spare:
            flops += 2.0 * math.prod(param.shape) * (_expert_share(mixer, context, executed_batch) if name in EXPERT else 1.0)
    if isinstance(mixer, Attention):
        rectangle = 4.0 * mixer.kv_heads * mixer.query_heads * mixer.head_dim * context
        flops += rectangle if executed_batch else 0.5 * rectangle
    if isinstance(mixer, Mamba):
        chunk, channels = min(mixer.chunk, context), mixer.heads * mixer.head_dim
        steps = -(-context // chunk) * chunk / context if executed_batch else 1.0
        flops += steps * (2.0 * chunk * (mixer.groups * mixer.state + channels) + 4.0 * channels * mixer.state)
    return flops


def _expert_share(mixer: MoE, context: int, executed_batch: int | None) -> Any:
    """How many experts' worth of rows a token costs, as a share of all experts: top k, or what padded blocks hold."""
    if not executed_batch:
        return mixer.top_k / mixer.experts
    tokens = executed_batch * context
    return block_rows(tokens * mixer.top_k, mixer.experts) / (tokens * mixer.experts)


def flops_per_token(arch: Arch, context: int, executed_batch: int | None = None) -> Any:
    """Forward matmul FLOPs per token of a sequence of `context` tokens, unembedding included.

    What the mathematics needs: half of attention's rectangle, top-k experts. With `executed_batch` instead what the CPU's
    program executes for a batch of that many sequences: the whole rectangle, rows padded to whole chunks and blocks.
    """
    blocks = sum(block_flops(mixer, params, context, executed_batch) for _, mixer, params in _blocks(arch))
    return 2.0 * arch.vocab * arch.embed + blocks


def training_flops_per_token(
    parent: Arch,
    budgets: Sequence[Arch],
    context: int,
    teacher: bool = True,
    remat: bool = False,
    executed_batch: int | None = None,
) -> Any:
    """Matmul FLOPs per token of one step: the teacher's forward pass, and three times the forward pass of every budget.

    Three times, as each matmul has two gradient matmuls; the fused head's too, which is never recomputed. With `remat` the
    backward pass computes every block again, but for the matmuls that end it. Masks at full width are `budgets=[parent] * n`.
    """
    total = flops_per_token(parent, context, executed_batch) if teacher else 0.0
    for arch in budgets:
        total += 3.0 * flops_per_token(arch, context, executed_batch)
        if remat:
            total += sum(block_flops(mixer, params, context, executed_batch, ENDS) for _, mixer, params in _blocks(arch))
    return total


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
