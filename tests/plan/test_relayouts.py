"""What fetching costs beside the network, by the TPU compiler: a fetched matrix is used as it lies."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elastic_jax.model.fetch import Way, fetch
from elastic_jax.model.kernels import Target
from elastic_jax.model.linear import into, out_of
from elastic_jax.plan.chips import topology_devices
from elastic_jax.plan.compiled import compile_program

TARGET = Target('tpu', kernels=True)
TOKENS, EMBED, WIDTH = 8192, 2688, (8, 8, 64)


@pytest.mark.slow
@pytest.mark.parametrize('embed', [2688, 2176, 1920])
def test_matmuls_with_fetched_heads_copy_next_to_nothing_forward_and_backward(embed):
    """A Mamba block's two projections: each of 64 chips has 42 rows of 2688, and a budget takes the leading ones of all."""
    devices = np.asarray(topology_devices('v5p:8x8x4').devices).reshape(4, 64)
    mesh = Mesh(devices, ('replica', 'fsdp'))
    first, last = (PartitionSpec(*spec) for spec in (('fsdp', None, None, None), (None, None, None, 'fsdp')))

    def block(x, w_in, w_out):
        w_in = fetch(w_in, Way(('fsdp',), 0, matrix=True), x.dtype).reshape(EMBED, -1)[:embed].reshape(embed, *WIDTH)
        w_out = fetch(w_out, Way(('fsdp',), 3, matrix=True), x.dtype).reshape(-1, EMBED)[:, :embed].reshape(*WIDTH, embed)
        hidden = jnp.square(jax.nn.relu(into(x, w_in, TARGET)))
        return out_of(hidden.reshape(1, TOKENS, -1), w_out, TARGET)

    def step(x, w_in, w_out, grad):
        return jax.vjp(jax.checkpoint(block), x, w_in, w_out)[1](grad)

    rows = PartitionSpec(('replica', 'fsdp'))
    specs = rows, first, last, rows
    program = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[:3], check_vma=False))
    kept = lambda shape, spec, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    stream = kept((256, TOKENS, embed), rows, jnp.bfloat16)
    weights = kept((EMBED, *WIDTH), first, jnp.float32), kept((*WIDTH, EMBED), last, jnp.float32)
    found = compile_program(program, (stream, *weights, stream), {}, sys.maxsize)
    assert found.relayout_cycles <= 0.02 * found.cycles
