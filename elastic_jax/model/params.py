"""The table of parameters: every parameter of an Arch declared once.

Initialisation, sharding, slicing, masking, permuting, cost, restoring and the Hugging Face name maps all derive from it. Each
dimension has a logical axis name; an elastic axis appears under its own name (`mlp`), and the G blocks of a blocked axis as
`mlp_blocks`. Because every elastic dimension is stored in importance order, a submodel's parameter is always the leading
corner of its parent's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from elastic_jax.arch import MLP, Arch, Attention, Mamba, Mixer, MoE, exact_divide
from elastic_jax.layout import FLAT, Layout, inner_width

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter.

    Attributes:
      mask: the axes whose mask multiplies it (the producing side).
      float32: kept so, whatever the dtype of the others.
      whole: every device computes with all of it, though it has an axis that others are split over.
      in_place: its mixer may be given the parent's, as a Summed, of which it uses the leading corner: a step does not cut it out.
    """

    shape: tuple[Any, ...]
    axes: tuple[str, ...]
    init: Initializer
    mask: tuple[str, ...] = ()
    float32: bool = False
    whole: bool = False
    in_place: bool = False


Table = dict[str, dict[str, Param]]


def layer_name(i: int) -> str:
    """The key of block i; zero-padded, so that sorted keys are in order."""
    return f'layer_{i:03d}'


def param_table(arch: Arch, layout: Layout = FLAT) -> Table:
    """Group -> name -> Param. Groups are `embedding`, `layer_000` …, `final_norm` and, when untied, `unembed`.

    Widths may be floats or traced values; then so are the shapes, and their products are differentiable counts.
    """
    depth = max(1, len(arch.mixers))
    vocab, embed = ('vocab', arch.vocab), ('embed', arch.embed)
    table = {'embedding': {'table': _param([vocab, embed], _normal(0.02), mask=('embed',))}}
    for i, mixer in enumerate(arch.mixers):
        if mixer is not None:
            declare = DECLARE[type(mixer)]
            norm = {'norm': _param([embed], _ones)}
            table[layer_name(i)] = norm | declare(mixer, arch.embed, layout, 1.0 / math.sqrt(2 * depth))
    table['final_norm'] = {'norm': _param([embed], _ones)}
    if not arch.tied:
        table['unembed'] = {'kernel': _param([embed, vocab], _fan_in(1))}
    return table


def leaves(table: Table) -> Iterator[tuple[str, str, Param]]:
    """(group, name, Param) of every parameter."""
    for group, params in table.items():
        for name, param in params.items():
            yield group, name, param


def map_table(function: Callable[[Param], Any], table: Table) -> dict[str, dict[str, Any]]:
    """The nested dict with `function(param)` in each parameter's place."""
    return {group: {name: function(param) for name, param in params.items()} for group, params in table.items()}


def abstract_params(arch: Arch, layout: Layout = FLAT, dtype: Any = jnp.float32) -> dict[str, dict[str, Any]]:
    """ShapeDtypeStructs of every parameter."""
    return map_table(lambda p: jax.ShapeDtypeStruct(p.shape, param_dtype(p, dtype)), param_table(arch, layout))


def init_params(key: jax.Array, arch: Arch, layout: Layout = FLAT, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters. Each leaf's key depends on its name alone, so the numbers do not depend on the other leaves."""
    table = param_table(arch, layout)
    params: dict[str, dict[str, Any]] = {group: {} for group in table}
    for group, name, param in leaves(table):
        leaf_key = jax.random.fold_in(key, _stable_hash(f'{group}/{name}'))
        params[group][name] = param.init(leaf_key, param.shape, jnp.float32).astype(param_dtype(param, dtype))
    return params


def param_dtype(param: Param, dtype: Any) -> Any:
    return jnp.float32 if param.float32 else dtype


def _attention(mixer: Attention, embed: Any, layout: Layout, depth_scale: float) -> dict[str, Param]:
    d = ('embed', embed)
    blocks = layout.blocks('kv_heads', mixer)
    kv = [('kv_heads_blocks', blocks), ('kv_heads', inner_width(layout, 'kv_heads', mixer, mixer.kv_heads))]
    q, h = ('query_heads', mixer.query_heads), ('head_dim', mixer.head_dim)
    declared = {
        'q': _param([d, *kv, q, h], _fan_in(1)),
        'k': _param([d, *kv, h], _fan_in(1)),
        'v': _param([d, *kv, h], _fan_in(1)),
        'o': _param([*kv, q, h, d], _fan_in(4, depth_scale), mask=('kv_heads', 'query_heads', 'embed')),
    }
    if mixer.bias:
        declared |= {
            'q_bias': _param([*kv, q, h], _zeros),
            'k_bias': _param([*kv, h], _zeros),
            'v_bias': _param([*kv, h], _zeros),
        }
    if mixer.output_bias:
        declared['o_bias'] = _param([d], _zeros, mask=('embed',))
    if mixer.qk_norm:
        declared |= {'q_norm': _param([h], _ones), 'k_norm': _param([h], _ones)}
    return declared


def _mamba(mixer: Mamba, embed: Any, layout: Layout, depth_scale: float) -> dict[str, Param]:
    del layout  # Heads are (groups, heads per group) by nature.
    d, n, taps = ('embed', embed), ('state', mixer.state), ('conv', mixer.conv)
    g, m, p = (
        ('mamba_groups', mixer.groups),
        ('mamba_heads', exact_divide(mixer.heads, mixer.groups)),
        ('mamba_head_dim', mixer.head_dim),
    )
    declared = {
        # The gated norm stands between the heads and the out-projection, so the gate z carries the heads' masks.
        'z': _param([d, g, m, p], _fan_in(1), mask=('mamba_heads', 'mamba_head_dim')),
        'x': _param([d, g, m, p], _fan_in(1)),
        'b': _param([d, g, n], _fan_in(1)),
        'c': _param([d, g, n], _fan_in(1)),
        'dt': _param([d, g, m], _fan_in(1)),
        'conv_x': _param([taps, g, m, p], _fan_in(1)),
        'conv_b': _param([taps, g, n], _fan_in(1)),
        'conv_c': _param([taps, g, n], _fan_in(1)),
        'a_log': _param([g, m], _a_log, float32=True),
        'd': _param([g, m], _ones, float32=True),
        'dt_bias': _param([g, m], _dt_bias, float32=True),
        'gated_norm': _param([g, m, p], _ones),
        'out': _param([g, m, p, d], _fan_in(3, depth_scale), mask=('embed',)),
    }
    if mixer.conv_bias:
        declared |= {
            'conv_x_bias': _param([g, m, p], _zeros),
            'conv_b_bias': _param([g, n], _zeros),
            'conv_c_bias': _param([g, n], _zeros),
        }
    return declared


def _mlp(mixer: MLP, embed: Any, layout: Layout, depth_scale: float) -> dict[str, Param]:
    d = ('embed', embed)
    f = [('mlp_blocks', layout.blocks('mlp', mixer)), ('mlp', inner_width(layout, 'mlp', mixer, mixer.width))]
    declared = {
        'up': _param([d, *f], _fan_in(1)),
        'down': _param([*f, d], _fan_in(2, depth_scale), mask=('mlp', 'embed')),
    }
    if mixer.activation == 'swiglu':
        declared['gate'] = _param([d, *f], _fan_in(1))
    if mixer.bias:
        declared |= {'up_bias': _param(f, _zeros), 'down_bias': _param([d], _zeros, mask=('embed',))}
        if mixer.activation == 'swiglu':
            declared['gate_bias'] = _param(f, _zeros)
    return declared


def _moe(mixer: MoE, embed: Any, layout: Layout, depth_scale: float) -> dict[str, Param]:
    d, f = ('embed', embed), ('expert_width', mixer.expert_width)
    e = [
        ('experts_blocks', layout.blocks('experts', mixer)),
        ('experts', inner_width(layout, 'experts', mixer, mixer.experts)),
    ]
    # Into an expert and out of it the embedding is last: of widths that are no whole tiles (1856) a TPU would otherwise keep
    # the transpose of one of them, and copy it in every pass.
    into = lambda: _param([*e, f, d], _fan_in(1, skip=3), in_place=True)
    declared = {
        'router': _param([d, *e], _fan_in(1), float32=True, whole=True),
        'expert_up': into(),
        'expert_down': _param([*e, f, d], _fan_in(1, depth_scale, skip=2), mask=('expert_width', 'embed'), in_place=True),
    }
    if mixer.correction_bias:
        declared['correction_bias'] = _param(e, _zeros, float32=True, whole=True)
    if mixer.activation == 'swiglu':
        declared['expert_gate'] = into()
    if not isinstance(mixer.shared_width, int) or mixer.shared_width:
        width = inner_width(layout, 'shared_width', mixer, mixer.shared_width)
        s = [('shared_width_blocks', layout.blocks('shared_width', mixer)), ('shared_width', width)]
        declared |= {
            'shared_up': _param([d, *s], _fan_in(1)),
            'shared_down': _param([*s, d], _fan_in(2, depth_scale), mask=('shared_width', 'embed')),
        }
        if mixer.activation == 'swiglu':
            declared['shared_gate'] = _param([d, *s], _fan_in(1))
    return declared


Declare = Callable[[Any, Any, Layout, float], dict[str, Param]]
DECLARE: dict[type[Mixer], Declare] = {Attention: _attention, Mamba: _mamba, MLP: _mlp, MoE: _moe}


def _param(dims: list[tuple[str, Any]], init: Initializer, mask: tuple[str, ...] = (), **flags: bool) -> Param:
    names, sizes = zip(*dims, strict=True)
    return Param(tuple(sizes), names, init, mask, **flags)


def _stable_hash(text: str) -> int:
    value = 2166136261  # FNV-1a: Python's own hash differs between processes.
    for byte in text.encode():
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value & 0x7FFFFFFF


def _normal(std: float) -> Initializer:
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def _fan_in(input_dims: int, scale: float = 1.0, skip: int = 0) -> Initializer:
    """Normal with variance scale² / fan-in, where the fan-in is `input_dims` dimensions after the first `skip`."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return scale / math.sqrt(math.prod(shape[skip : skip + input_dims])) * jax.random.normal(key, shape, dtype)

    return init


def _ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.ones(shape, dtype)


def _zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


def _a_log(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """log of A drawn uniformly from 1 to 16, as Mamba-2 does."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def _dt_bias(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Inverse softplus of a step size drawn log-uniformly from 0.001 to 0.1, as Mamba does."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(1e-3), math.log(1e-1)))
    return dt + jnp.log(-jnp.expm1(-dt))
