"""The router: a small network per axis that learns which widths each budget should have (method.md §4).

one-hot(budget) → linear → leaky ReLU → linear → logits over that axis's choices, for every block when chosen per layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.arch import Arch, layer_axes
from elastic_jax.layout import FLAT, Layout, inner_width
from elastic_jax.model.params import layer_name
from elastic_jax.nest.budgets import AxisChoices, Grid, Metric
from elastic_jax.nest.masks import Masks, axis_sizes, prefix_mask

HIDDEN = 256
Router = dict[str, dict[str, jax.Array]]
Probabilities = dict[str, jax.Array]  # axis -> [rows, choices]


@dataclasses.dataclass(frozen=True)
class Anneal:
    """Temperature falls and the logits' scale rises over a search (method.md §4)."""

    start_temperature: float = 1.0
    end_temperature: float = 0.05
    start_scale: float = 1.0
    end_scale: float = 10.0

    def at(self, progress: Any) -> tuple[jax.Array, jax.Array]:
        """(temperature, scale) at a share of the search: geometric for the one, linear for the other."""
        ratio = self.end_temperature / self.start_temperature
        return self.start_temperature * ratio**progress, self.start_scale + (self.end_scale - self.start_scale) * progress


def init_router(key: jax.Array, grid: Grid, budgets: int) -> Router:
    """Weights from N(0, 0.1), no biases."""
    router = {}
    for i, choices in enumerate(grid):
        first, second = jax.random.split(jax.random.fold_in(key, i))
        out = choices.rows * len(choices.widths)
        router[choices.axis] = {
            'hidden': 0.1 * jax.random.normal(first, (budgets, HIDDEN)),
            'out': 0.1 * jax.random.normal(second, (HIDDEN, out)),
        }
    return router


def router_logits(router: Router, grid: Grid, budget_N: jax.Array) -> Probabilities:
    """Logits [rows, choices] of every axis, for a budget given as a one-hot vector or as a mixture of two (interpolation)."""
    result = {}
    for choices in grid:
        net = router[choices.axis]
        hidden = jax.nn.leaky_relu(budget_N @ net['hidden'], 0.1)
        result[choices.axis] = (hidden @ net['out']).reshape(choices.rows, len(choices.widths))
    return result


def gumbel_softmax(key: jax.Array, logits: Probabilities, temperature: Any, scale: Any) -> Probabilities:
    """softmax((scale · logits + Gumbel noise) / temperature) of every row (arXiv 1611.01144)."""
    keys = dict(zip(sorted(logits), jax.random.split(key, len(logits)), strict=True))
    return {
        axis: jax.nn.softmax((scale * value + jax.random.gumbel(keys[axis], value.shape)) / temperature, axis=-1)
        for axis, value in logits.items()
    }


def row_of(choices: AxisChoices, block: int) -> int:
    return choices.blocks.index(block) if choices.per_layer else 0


def soft_masks(parent: Arch, grid: Grid, probabilities: Probabilities, layout: Layout = FLAT) -> Masks:
    """Σ_i π_i · prefix(choice_i) along every axis."""
    by_axis = {choices.axis: choices for choices in grid}
    embed_D = jnp.ones(parent.embed)
    if 'embed' in by_axis:
        embed_D = _mix(probabilities['embed'][0], by_axis['embed'].widths, parent.embed)
    blocks: dict[str, dict[str, jax.Array]] = {}
    for i, mixer in enumerate(parent.mixers):
        if mixer is None:
            continue
        blocks[layer_name(i)] = own = {}
        for name, full in axis_sizes(mixer).items():
            if name in by_axis:
                choices = by_axis[name]
                inner = [inner_width(layout, name, mixer, min(width, full)) for width in choices.widths]
                own[name] = _mix(probabilities[name][row_of(choices, i)], inner, inner_width(layout, name, mixer, full))
    return Masks(embed_D, blocks, {layer_name(i): keep for i, keep in enumerate(keep_shares(parent, grid, probabilities))})


def keep_shares(parent: Arch, grid: Grid, probabilities: Probabilities) -> list[Any]:
    """The probability that each block is kept; 0 for a block that the parent does not have."""
    choices = next((choices for choices in grid if choices.axis == 'layers'), None)
    if choices is None:
        return [0.0 if mixer is None else 1.0 for mixer in parent.mixers]
    kept_N = jnp.asarray(choices.widths)
    shares = {unit: jnp.sum(probabilities['layers'][0] * (kept_N > place)) for place, unit in enumerate(parent.kept_units())}
    return [shares.get(i // parent.unit_blocks, 0.0) for i in range(len(parent.mixers))]


def _mix(probabilities_C: jax.Array, widths: Any, size: int) -> jax.Array:
    return probabilities_C @ jnp.stack([prefix_mask(size, width) for width in widths])


def expected_cost(parent: Arch, grid: Grid, probabilities: Probabilities, measure: Metric) -> jax.Array:
    """Cost of the expected widths ŵ = π · choices; differentiable."""
    by_axis = {choices.axis: choices for choices in grid}
    expect = lambda choices, row, full: (
        probabilities[choices.axis][row] @ jnp.minimum(jnp.asarray(choices.widths, jnp.float32), full)
    )
    mixers = []
    for i, mixer in enumerate(parent.mixers):
        changes = {
            axis.field: expect(by_axis[axis.name], row_of(by_axis[axis.name], i), getattr(mixer, axis.field))
            for axis in layer_axes()
            if mixer is not None and isinstance(mixer, axis.kind) and axis.name in by_axis and i in by_axis[axis.name].blocks
        }
        mixers.append(dataclasses.replace(mixer, **changes) if changes else mixer)
    embed = expect(by_axis['embed'], 0, parent.embed) if 'embed' in by_axis else parent.embed
    soft = dataclasses.replace(parent, embed=embed, mixers=tuple(mixers))
    return measure(soft, keep_shares(parent, grid, probabilities))


def budget_loss(
    parent: Arch,
    grid: Grid,
    probabilities: Probabilities,
    target: Any,
    measure: Metric,
    dead_zone: float = 0.05,
    anchor: float = 10.0,
) -> tuple[jax.Array, jax.Array]:
    """(loss, expected share of the parent's cost).

    |cost(ŵ) / (target · cost_full) − 1| outside its dead zone; for the full budget (target 1) instead the anchor,
    10 · mean squared distance of the expected widths from the full ones (method.md §4).
    """
    share = expected_cost(parent, grid, probabilities, measure) / measure(parent, None)
    miss = jnp.abs(share / target - 1.0)
    distances = []
    for choices in grid:
        relative_C = jnp.asarray(choices.widths, jnp.float32) / choices.widths[0]
        distances.append(jnp.mean(jnp.square(probabilities[choices.axis] @ relative_C - 1.0)))
    anchored = anchor * jnp.mean(jnp.stack(distances))
    return jnp.where(target >= 1.0, anchored, jax.nn.relu(miss - dead_zone)), share


def interpolate(targets: Mapping[str, float], target: float) -> list[float]:
    """Weights over the trained budgets (largest first) whose mixture stands for a target between two of them."""
    shares = list(targets.values())
    if target >= shares[0]:
        return [1.0] + [0.0] * (len(shares) - 1)
    for i in range(len(shares) - 1):
        if shares[i] >= target >= shares[i + 1]:
            weight = (target - shares[i + 1]) / (shares[i] - shares[i + 1])
            return [weight if j == i else 1 - weight if j == i + 1 else 0.0 for j in range(len(shares))]
    return [0.0] * (len(shares) - 1) + [1.0]
