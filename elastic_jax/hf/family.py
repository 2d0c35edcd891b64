"""What a model family is: config.json to Arch and back, and the names of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from elastic_jax.arch import Arch, Attention, Mixer, Rope, layer_axes
from elastic_jax.errors import UserError
from elastic_jax.hf.config_json import Config
from elastic_jax.hf.name_map import Names


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
      to_arch: config.json -> Arch; raises UserError naming a part that the Arch does not have.
      to_config: Arch -> the entries of config.json that it fixes, dropped blocks left out; raises UserError when the family
        cannot hold it.
      replaced: entries of a parent's config.json which must not survive beside those.
    """

    model_type: str
    architecture: str
    to_arch: Callable[[Config], Arch]
    to_config: Callable[[Arch], dict[str, Any]]
    names: Names
    replaced: tuple[str, ...] = ()


def kept_pattern(arch: Arch) -> str:
    """The pattern without its dropped blocks."""
    return arch.pattern.replace('.', '')


def common_mixer(arch: Arch, kind: type[Mixer], model_type: str) -> Any:
    """The one mixer of this kind that all such blocks share, or None. Raises UserError when they differ."""
    found = {mixer for mixer in arch.mixers if isinstance(mixer, kind)}
    if len(found) > 1:
        own = {axis.name for axis in layer_axes() if axis.kind is kind}
        differing = [name for name in arch.widths() if name.partition('@')[0] in own and '@' in name]
        raise UserError(
            f'{model_type} in transformers has one width per axis, but this model differs by layer '
            f'({", ".join(differing[:3]) or kind.__name__}); the nearest it can hold: --widths {homogeneous_widths(arch)}'
        )
    return next(iter(found), None)


def homogeneous_widths(arch: Arch, **changes: int) -> str:
    """The nearest model with one width per axis, as `--widths` takes it."""
    widths = {'embed': arch.embed}
    if arch.layers < arch.units:
        widths['layers'] = arch.layers
    for axis in arch.axes():
        values = list(arch.layer_widths(axis.name).values())
        if values:
            mean = sum(values) / len(values)
            widths[axis.name] = min(values, key=lambda value: (abs(value - mean), value))
    return ','.join(f'{name}={width}' for name, width in {**widths, **changes}.items())


def refuse(model_type: str, condition: bool, problem: str) -> None:
    """Raises UserError when a family cannot hold a model."""
    if condition:
        raise UserError(f'{model_type} in transformers cannot hold this model: {problem}; export in the orbax format instead')


def rope_from_config(config: Config) -> Rope:
    """The rotary embedding of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`).

    Of both, transformers 5 takes `rope_scaling` alone, unless it is empty.
    """
    key = 'rope_scaling' if config.value('rope_scaling', default={}) else 'rope_parameters'
    given = config.value(key, default={})
    if not isinstance(given, dict):
        raise UserError(f'{config.where}: {key}={given!r} is not an object')
    rope = Config(given, f'{config.where} {key}')
    theta = rope.number('rope_theta', default=config.value('rope_theta', default=10000.0))
    rope.only('partial_rotary_factor', 1.0, what='a rotary embedding over a part of the head')
    config.only('partial_rotary_factor', 1.0, what='a rotary embedding over a part of the head')
    kind = rope.value('rope_type', 'type', default='default')
    if kind == 'default':
        return Rope(theta)
    if kind != 'llama3':
        raise UserError(f'{rope.where}: rope_type={kind!r} is not supported; supported: default, llama3')
    context = ('original_max_position_embeddings',)
    names = (('factor',), ('low_freq_factor',), ('high_freq_factor',), context)
    return Rope(theta, tuple(rope.number(*name) for name in names))


def rope_to_config(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` for transformers 5; vLLM and transformers 4 read `rope_theta` and `rope_scaling`."""
    if not rope.scaling:
        return {'rope_theta': rope.theta, 'rope_parameters': {'rope_type': 'default', 'rope_theta': rope.theta}}
    factor, low, high, context = rope.scaling
    scaling = {
        'rope_type': 'llama3',
        'factor': factor,
        'low_freq_factor': low,
        'high_freq_factor': high,
        'original_max_position_embeddings': int(context),
    }
    return {
        'rope_theta': rope.theta,
        'rope_scaling': scaling,
        'rope_parameters': {**scaling, 'rope_theta': rope.theta},
    }


def attention_from_config(config: Config, embed: int, **kwargs: Any) -> Attention:
    """The attention that `num_attention_heads`, `num_key_value_heads` and `head_dim` describe."""
    heads = config.whole('num_attention_heads')
    kv_heads = config.whole('num_key_value_heads', default=heads)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        found = f'num_attention_heads={heads} and num_key_value_heads={kv_heads}'
        raise UserError(f'{config.where}: {found} must be at least 1, the one a multiple of the other; restore them')
    head_dim = config.whole('head_dim', default=embed // heads)
    return Attention(kv_heads=kv_heads, query_heads=heads // kv_heads, head_dim=head_dim, **kwargs)


def attention_to_config(mixer: Attention) -> dict[str, Any]:
    return {
        'num_attention_heads': mixer.kv_heads * mixer.query_heads,
        'num_key_value_heads': mixer.kv_heads,
        'head_dim': mixer.head_dim,
    }
