"""Checkpoints that several processes saved, each its own shards: any slice of them is the slice of the whole, at its own cost."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.experimental import multihost_utils

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE
from elastic_jax.checkpoint.manager import CheckpointManager
from elastic_jax.checkpoint.manifest import Budget, Manifest
from elastic_jax.checkpoint.restore import restore_slice
from elastic_jax.cost import cost_of
from elastic_jax.layout import Layout
from elastic_jax.nest.slice import slice_params
from elastic_jax.parallel.mesh import make_mesh
from elastic_jax.parallel.sharding import param_shardings
from tests.tiny import numpy_params

ROOT = Path(__file__).parents[2]
LAYOUT = Layout(mlp=4, shared_width=2, experts=4, kv_heads=2)
# Large enough that what every read costs (the index, whole chunks) is small beside the parameters.
ARCH = Arch.from_pattern(
    'M*-E',
    vocab=512,
    embed=1024,
    mamba=Mamba(heads=16, head_dim=64, groups=2, state=64),
    attention=Attention(kv_heads=4, query_heads=4, head_dim=64),
    mlp=MLP(width=2048),
    moe=MoE(experts=8, expert_width=512, top_k=2, shared_width=512),
)
SLICES = (
    {},
    {'embed': 512},
    {'query_heads': 2},
    {'kv_heads': 2},
    {'mamba_heads': 8},
    {'mamba_head_dim': 32},
    {'mlp': 1024},
    {'experts': 4},
    {'expert_width': 256},
    {'shared_width': 256},
    {'layers': 2},
    {'embed': 768, 'mlp': 1536, 'experts': 4, 'expert_width': 384, 'mamba_heads': 8, 'kv_heads': 2, 'layers': 3},
    {'embed': 1002, 'mlp': 2000, 'expert_width': 500},
)


def save_shards(workdir: str, address: str, process: int) -> None:
    """One of two processes with four devices each: parameters over fsdp x expert x tensor, through the run's own manager."""
    jax.config.update('jax_num_cpu_devices', 4)
    jax.distributed.initialize(address, 2, process)
    mesh = make_mesh({'fsdp': 2, 'expert': 2, 'tensor': 2})
    place = lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    params = jax.tree.map(place, numpy_params(ARCH, LAYOUT), param_shardings(ARCH, LAYOUT, mesh))
    manifest = Manifest(
        arch=ARCH, layout=LAYOUT, budgets={'full': Budget(ARCH, cost_of(ARCH).to_json())}, step=1, stage='short', stage_step=0,
        rng=[0], dtypes={'params': 'float32'}, tokenizer={'kind': 'bytes'}, hf_config=None, data_fingerprint='',
        ordering_hash='', experiment='test',
    )  # fmt: skip
    manager = CheckpointManager(workdir)
    manager.save(1, params=params, opt_state={}, router={}, ordering={}, data={}, manifest=manifest)
    manager.wait()
    manager.close()
    multihost_utils.sync_global_devices('saved')
    before = bytes_read()
    restored = restore_slice(workdir, ARCH, param_shardings(ARCH, LAYOUT, mesh))
    own = [shard for leaf in jax.tree.leaves(restored) for shard in leaf.addressable_shards if shard.replica_id == 0]
    told = {'read': bytes_read() - before, 'held': sum(shard.data.nbytes for shard in own)}
    (Path(workdir) / f'{process}.json').write_text(json.dumps(told))


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
    """A workdir with a checkpoint that two processes saved."""
    workdir = tmp_path_factory.mktemp('sharded')
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    run = [
        sys.executable,
        '-c',
        'import sys; from tests.checkpoint.test_sharded import save_shards as run; run(*eval(sys.argv[1]))',
    ]
    processes = [
        subprocess.Popen([*run, repr((str(workdir), address, i))], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-3000:]
    return workdir


def test_no_process_writes_or_reads_more_than_its_share(sharded):
    params = sharded / 'checkpoints' / '1' / 'params'
    size = lambda folder: sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())
    stored, whole = size(params), sum(leaf.nbytes for leaf in jax.tree.leaves(numpy_params(ARCH, LAYOUT)))
    for process in range(2):
        told = json.loads((sharded / f'{process}.json').read_text())
        assert 0.45 < size(params / f'ocdbt.process_{process}') / stored < 0.55
        assert 0.45 < told['held'] / whole < 0.55
        assert 0.45 < told['read'] / stored < 0.55


def bytes_read() -> int:
    counters = ts.experimental_collect_matching_metrics('/tensorstore/kvstore/file/bytes_read')
    return sum(value['value'] for counter in counters for value in counter['values'])


def test_every_slice_is_that_of_the_whole_and_reads_about_its_own_bytes(sharded):
    parts = [path.name for path in (sharded / 'checkpoints' / '1' / 'params').iterdir()]
    assert {'ocdbt.process_0', 'ocdbt.process_1'} <= set(parts)
    whole = numpy_params(ARCH, LAYOUT)
    stored = sum(path.stat().st_size for path in (sharded / 'checkpoints' / '1' / 'params').rglob('*') if path.is_file())
    compression = stored / sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    for widths in SLICES:
        child, before = ARCH.narrow(widths), bytes_read()
        params = restore_slice(sharded, child)
        read, size = bytes_read() - before, compression * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        jax.tree.map(np.testing.assert_array_equal, params, slice_params(whole, ARCH, child, LAYOUT))
        allowed = 1.10 if any(width % 8 for width in widths.values()) else 1.05
        assert 0.9 < read / size <= allowed, f'{widths}: {read} bytes were read for {size:.0f}'
