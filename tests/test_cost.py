"""Invariant 8: counts equal the parameters that exist, FLOPs the matmuls that a compiled program runs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax import cost, hlo
from elastic_jax.arch import AXES, Arch, Attention, Mamba, MoE
from elastic_jax.model.cache import init_cache
from elastic_jax.model.decoder import logits
from elastic_jax.model.params import abstract_params, init_params, layer_name
from elastic_jax.train.step import StepConfig, elastic_loss
from tests.strategies import narrowings
from tests.tiny import FAMILIES, HYBRID, LLAMA, QWEN_MOE

# Nemotron 3 Nano 30B-A3B, method.md §1.
NANO = Arch.from_pattern(
    'MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME',
    vocab=131072,
    embed=2688,
    mamba=Mamba(heads=64, head_dim=64, groups=8, state=128),
    attention=Attention(kv_heads=2, query_heads=16, head_dim=128),
    moe=MoE(experts=128, expert_width=1856, top_k=6, shared_width=3712, scale=2.5),
)
ONE_MIXER = {letter: dataclasses.replace(HYBRID, mixers=(mixer,)) for letter, mixer in zip('ME*-', HYBRID.mixers, strict=False)}
every_family = pytest.mark.parametrize('arch', FAMILIES.values(), ids=FAMILIES)


@pytest.mark.parametrize(
    ('widths', 'published'),
    [
        ({}, (31.58, 3.58)),
        ({'embed': 2240, 'expert_width': 1664, 'mamba_heads': 56}, (23.70, 2.79)),
        ({'embed': 1920, 'expert_width': 960}, (12.43, 2.08)),
    ],
    ids=['30B', '23B', '12B'],
)
def test_published_shapes_have_their_published_counts(widths, published):
    arch = NANO.narrow(widths) if widths else NANO
    assert (round(cost.parameters(arch) / 1e9, 2), round(cost.active_parameters(arch) / 1e9, 2)) == published


@every_family
def test_counts_and_bytes_are_those_of_initialised_parameters(arch):
    params = jax.eval_shape(lambda key: init_params(key, arch, dtype=jnp.bfloat16), jax.random.key(0))
    leaves = jax.tree.leaves(params)
    assert cost.parameters(arch) == sum(leaf.size for leaf in leaves)
    assert cost.weight_bytes(arch) == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert cost.weight_bytes(arch, 4.0) == sum(4 * leaf.size for leaf in leaves)
    # One token uses the parameters of top_k single experts instead of all of them.
    unused = 0
    for i, mixer in enumerate(arch.mixers):
        if isinstance(mixer, MoE):
            one = sum(math.prod(leaf.shape[2:]) for name, leaf in params[layer_name(i)].items() if name.startswith('expert_'))
            unused += (mixer.experts - mixer.top_k) * one
    assert cost.active_parameters(arch) == cost.parameters(arch) - unused


@given(st.data())
def test_counts_hold_for_any_narrowing(data):
    arch = data.draw(st.sampled_from(list(FAMILIES.values())))
    child = arch.narrow(data.draw(narrowings(arch)))
    shapes = jax.eval_shape(lambda key: init_params(key, child), jax.random.key(0))
    assert cost.parameters(child) == sum(leaf.size for leaf in jax.tree.leaves(shapes))


@every_family
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_cache_bytes_are_those_of_allocated_caches(arch, dtype):
    batch, slots, size = 3, 20, jnp.dtype(dtype).itemsize
    nbytes = lambda letter: sum(
        leaf.nbytes
        for i, kind in enumerate(arch.pattern)
        if kind == letter
        for leaf in jax.tree.leaves(init_cache(arch, batch, slots, dtype).blocks[layer_name(i)])
    )
    assert batch * cost.kv_bytes(arch, slots, size) == nbytes('*')
    assert batch * cost.ssm_bytes(arch, size) == nbytes('M')
    expected = cost.weight_bytes(arch, 1.0) + nbytes('*') + nbytes('M')
    assert cost.memory_bytes(arch, slots, batch, bytes_per_param=1.0, bytes_per_value=size) == expected


def with_width(arch, axis, width):
    """The Arch with one width changed, unchecked: it may be larger than before, fractional or traced."""
    if AXES[axis].kind is None:
        return dataclasses.replace(arch, **{axis: width})
    change = lambda mixer: dataclasses.replace(mixer, **{AXES[axis].field: width})
    return dataclasses.replace(arch, mixers=tuple(change(m) if isinstance(m, AXES[axis].kind) else m for m in arch.mixers))


@pytest.mark.parametrize('axis', [axis.name for axis in HYBRID.axes() if axis.name != 'layers'])
@pytest.mark.parametrize(
    'measure',
    [
        cost.parameters,
        cost.active_parameters,
        lambda arch: cost.memory_bytes(arch, 128, 2),
        lambda arch: cost.flops_per_token(arch, 32),
    ],
    ids=['parameters', 'active', 'memory', 'flops'],
)
def test_gradients_are_finite_differences_of_whole_models(axis, measure):
    """Costs are at most quadratic in a width, so the central difference of two real models is the derivative."""
    width = HYBRID.widths()[axis]
    step = 2 if axis == 'mamba_heads' else 1
    difference = (measure(with_width(HYBRID, axis, width + step)) - measure(with_width(HYBRID, axis, width - step))) / (2 * step)
    gradient = jax.grad(lambda w: jnp.float32(measure(with_width(HYBRID, axis, w))))(float(width))
    np.testing.assert_allclose(gradient, difference, rtol=1e-5, atol=1e-2)
    counted = measure(with_width(HYBRID, axis, float(width)))
    assert counted == pytest.approx(measure(HYBRID), rel=1e-6)


def test_keep_weighs_blocks_as_dropping_them_does():
    ranked = dataclasses.replace(HYBRID, ranking=(4, 0, 2, 1, 3))
    child = ranked.narrow(layers=3)
    keep = [float(mixer is not None) for mixer in child.mixers]
    for measure in (cost.parameters, cost.active_parameters, lambda a, keep=None: cost.memory_bytes(a, 64, 2, keep=keep)):
        assert measure(ranked, keep=keep) == pytest.approx(measure(child), rel=1e-9)
        halves = measure(ranked, keep=[0.5] * 5)
        assert halves == pytest.approx((measure(ranked) + measure(dataclasses.replace(ranked, mixers=(None,) * 5))) / 2, rel=1e-9)


# 13 is no multiple of a chunk.
FORWARD = [(arch, length) for arch in ONE_MIXER.values() for length in (32, 13)] + [(arch, 13) for arch in FAMILIES.values()]


@pytest.mark.parametrize(('arch', 'length'), FORWARD, ids=lambda value: value if isinstance(value, int) else value.pattern)
def test_forward_flops_are_the_compiled_programs_matmuls(arch, length):
    batch = 2
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    compiled = jax.jit(lambda params, tokens: logits(params, tokens, arch)).lower(abstract_params(arch), tokens).compile()
    expected = batch * length * cost.flops_per_token(arch, length, executed_batch=batch)
    assert hlo.matmul_flops(compiled.as_text()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ('arch', 'remat', 'teacher'),
    [(HYBRID, True, True), (LLAMA, True, False), (QWEN_MOE, False, True)],
    ids=['hybrid-remat', 'llama-no-teacher', 'qwen_moe'],
)
def test_training_flops_are_the_compiled_steps_matmuls(arch, remat, teacher):
    batch, length = 2, 16
    child = arch.narrow(embed=24, layers=arch.layers - 1)
    loss = elastic_loss(
        arch, [('full', arch), ('small', child)], [0.5, 0.5], StepConfig(remat=remat, chunk=8), 'frozen' if teacher else 'none'
    )
    ints, floats = (jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, jnp.float32))
    inputs = {'tokens': ints, 'targets': ints, 'segment_ids': ints, 'positions': ints, 'loss_mask': floats}
    params = abstract_params(arch)
    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = gradients.lower(params, params, inputs, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    per_token = cost.training_flops_per_token(arch, [arch, child], length, teacher, remat, executed_batch=batch)
    # The weighted sum of the experts' outputs has one gradient matmul, not two.
    tolerance = 0.01 if any(isinstance(mixer, MoE) for mixer in arch.mixers) else 1e-9
    assert hlo.matmul_flops(compiled.as_text()) == pytest.approx(batch * length * per_token, rel=tolerance)


def test_needed_flops_are_the_executed_ones_without_padding_and_the_masked_half():
    attention, moe = ONE_MIXER['*'], ONE_MIXER['E']
    head = 2 * 64 * 32
    mixer, length = attention.mixers[0], 512
    executed = cost.flops_per_token(attention, length, executed_batch=1)
    masked_half = 2 * mixer.kv_heads * mixer.query_heads * mixer.head_dim * length
    assert cost.flops_per_token(attention, length) == executed - masked_half
    two_experts, shared, router = 2 * 2 * (32 * 16), 2 * (32 * 24), 32 * 8
    assert cost.flops_per_token(moe, length) == head + 2 * (two_experts + shared + router)


def test_cost_of_rounds_once_and_is_json():
    found = cost.cost_of(HYBRID, 64)
    assert found.parameters == cost.parameters(HYBRID)
    assert (found.kv_bytes, found.ssm_bytes) == (cost.kv_bytes(HYBRID, 64), cost.ssm_bytes(HYBRID))
    assert json.loads(json.dumps(found.to_json())) == dataclasses.asdict(found)
    assert all(isinstance(value, int) for value in found.to_json().values())
