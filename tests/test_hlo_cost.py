"""What programs over eight devices exchange, against what follows from the shapes of their arrays."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from elastic_jax.errors import WorkError
from elastic_jax.hlo_cost import KINDS, RELAYOUTS, Collective, collectives, estimated_cycles

# Compiled in a process with eight devices; this one has one.
PROGRAMS = """
import json, jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def text(f, shape, spec, out):
    f = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
    return f.lower(x).compile().as_text()

gather = lambda x: jax.lax.all_gather(x, 'a', axis=0, tiled=True)
loop = lambda x: jax.lax.scan(lambda c, _: (jnp.tanh(gather(c)[:2] + c), None), x, None, length=5)[0]
print(json.dumps({
    'gather': text(gather, (8, 3), P('a'), P()),
    'gather in a loop': text(loop, (8, 3), P('a'), P('a')),
    'scatter': text(lambda x: jax.lax.psum_scatter(x, 'b', scatter_dimension=0, tiled=True), (8, 3), P(), P('b')),
    'sum': text(lambda x: jax.lax.psum(x, 'a'), (8, 3), P('a'), P()),
    'sum of all': text(lambda x: jax.lax.psum(x, ('a', 'b')), (8, 3), P(('a', 'b')), P()),
    'sum of a pair': text(lambda x: sum(jax.lax.psum((x, x[:1] * 2), 'a')), (8, 3), P('a'), P()),
    'exchange': text(lambda x: jax.lax.all_to_all(x, 'b', 0, 1, tiled=True), (8, 6), P(), P('b')),
    'permute': text(lambda x: jax.lax.ppermute(x, 'a', [(i, (i + 1) % 4) for i in range(4)]), (8, 3), P('a'), P('a')),
    'nothing': text(lambda x: x + 1, (8, 3), P('a'), P('a')),
}))
"""

EXPECTED = {  # kind, count, bytes of float32 arrays, devices in a group
    'gather': ('all-gather', 1, 4 * 8 * 3, 4),
    'gather in a loop': ('all-gather', 5, 5 * 4 * 8 * 3, 4),
    'scatter': ('reduce-scatter', 1, 4 * 8 * 3, 2),
    'sum': ('all-reduce', 1, 4 * 2 * 3, 4),
    'sum of all': ('all-reduce', 1, 4 * 1 * 3, 8),
    'sum of a pair': ('all-reduce', 1, 4 * (2 * 3 + 1 * 3), 4),
    'exchange': ('all-to-all', 1, 4 * 8 * 6, 2),
    'permute': ('collective-permute', 1, 4 * 2 * 3, 2),
}


@pytest.fixture(scope='module')
def texts():
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': '8', 'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run([sys.executable, '-c', PROGRAMS], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize('name', EXPECTED)
def test_a_collective_is_counted_with_its_bytes(texts, name):
    kind, count, size, devices = EXPECTED[name]
    found = collectives(texts[name])
    assert found[kind] == Collective(count, size, {devices: (count, size)})
    assert all(found[other] == Collective() for other in KINDS if other != kind)


def test_a_program_that_exchanges_nothing(texts):
    assert collectives(texts['nothing']) == {kind: Collective() for kind in KINDS}


# As the TPU compiler writes them: asynchronous pairs, loops whose count stands in their condition, cycles beside fusions.
ONE = """HloModule one, num_partitions=32

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[4,8]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0}} parameter(0)
  ROOT %sum = f32[4,8]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}
"""


@pytest.mark.parametrize(
    ('groups', 'size'),
    [
        ('{}', 32),
        ('{{0,1},{2,3}}', 2),
        ('[4,8]<=[32]', 8),
        ("mesh['replica'=2,'fsdp'=16] {'fsdp'}", 16),
        ("mesh['replica'=2,'fsdp'=16], device_ids=([32]) {'replica','fsdp'}", 32),
        ("mesh['fsdp'=32] {'fsdp':(4)8}", 8),
    ],
)
def test_the_devices_of_a_group_are_read_in_every_form(groups, size):
    assert collectives(ONE.format(groups=groups))['all-reduce'] == Collective(1, 4 * 8 * 4, {size: (1, 4 * 8 * 4)})


def test_a_form_that_is_not_known_is_said_and_not_guessed():
    with pytest.raises(WorkError, match=re.escape("writes its groups of devices as 'replica_groups=torus(4,8)")):
        collectives(ONE.format(groups='torus(4,8)'))


TPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %c = bf16[] add(%a, %b)
}

%fused (p.0: bf16[16,8]) -> bf16[16,8] {
  %p.0 = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %tanh.1 = bf16[16,8]{1,0:T(8,128)(2,1)} tanh(%p.0), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%async (q.0: bf16[16,8]) -> bf16[4,8] {
  %q.0 = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %rs.1 = bf16[4,8]{1,0:T(8,128)(2,1)} reduce-scatter(%q.0), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

%all-reduce-scatter (r.0: bf16[16,8]) -> bf16[4,8] {
  %r.0 = bf16[16,8]{1,0:T(8,128)(2,1)} parameter(0)
  %ar.0 = bf16[16,8]{1,0:T(8,128)(2,1)} all-reduce(%r.0), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %whole = bf16[16,8]{1,0:T(8,128)(2,1)} bitcast(%ar.0)
  %own = u32[] partition-id()
  ROOT %part = bf16[4,8]{1,0:T(8,128)(2,1)} dynamic-slice(%whole, %own, %own), dynamic_slice_sizes={4,8}
}

%body (s.0: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %s.0 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i.0 = s32[]{:T(128)} get-tuple-element(%s.0), index=0
  %two = s32[]{:T(128)} constant(2)
  %i.1 = s32[]{:T(128)} add(%i.0, %two)
  %x.0 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%s.0), index=1
  %ag.0 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%x.0), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %ag.1 = bf16[16,8]{1,0} all-gather-done(%ag.0)
  %f.0 = bf16[16,8]{1,0} fusion(%ag.1), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  %rs.2 = ((bf16[16,8]{1,0}), bf16[4,8]{1,0}, s32[]) async-start(%f.0), calls=%async
  %rs.3 = bf16[4,8]{1,0} async-done(%rs.2), calls=%async
  %rs.4 = bf16[4,8]{1,0} fusion(%f.0), kind=kCustom, calls=%all-reduce-scatter
  ROOT %s.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%i.1, %rs.4)
}

%condition (s.0: (s32[], bf16[4,8])) -> pred[] {
  %s.0 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %seven = s32[]{:T(128)} constant(7)
  %i.0 = s32[]{:T(128)} get-tuple-element(%s.0), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.0, %seven), direction=LT
}

ENTRY %main (x: bf16[4,8]) -> bf16[4,8] {
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} copy(%zero), backend_config={"window_config":{"estimated_cycles":"10"}}
  %t = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%i, %x)
  %w = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%t), condition=%condition, body=%body
  %y = bf16[4,8]{1,0} get-tuple-element(%w), index=1
  %u = bf16[4,8]{1,0} copy(%x), backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  ROOT %sum = bf16[4,8]{1,0} all-reduce(%y), replica_groups={}, to_apply=%add
}
"""


def test_the_tpu_compilers_text():
    found, runs, whole = collectives(TPU), 3, 2 * 16 * 8  # 1, 3, 5 are less than 7
    assert found['all-gather'] == Collective(runs, runs * whole, {4: (runs, runs * whole)})
    assert found['reduce-scatter'] == Collective(2 * runs, 2 * runs * whole, {4: (2 * runs, 2 * runs * whole)})
    assert found['all-reduce'] == Collective(1, whole // 4, {8: (1, whole // 4)})
    assert estimated_cycles(TPU) == 10 + 3 * 100
    assert estimated_cycles(TPU, RELAYOUTS) == 10


def test_a_program_for_the_cpu_has_no_cycles():
    assert estimated_cycles(jax.jit(jnp.tanh).lower(1.0).compile().as_text()) == 0
