"""Slices cost their size: bytes, seconds and memory of loading slices of a random checkpoint made on the spot.

python experiments/bench/slices.py --gb 3

Each slice is loaded in a fresh process. Bytes are those that it asked the system to read (/proc/self/io, rchar), whatever
the page cache held. The parameters are random bits, which no compression shortens, so stored bytes are the slice's bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from elastic_jax.api import open_checkpoint
from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE
from elastic_jax.checkpoint.lazy import LazyLeaf, save_lazily
from elastic_jax.checkpoint.manifest import Budget, Manifest
from elastic_jax.checkpoint.restore import restore_slice
from elastic_jax.cost import cost_of
from elastic_jax.layout import Layout
from elastic_jax.model.params import leaves, map_table, param_table

LAYOUT = Layout(mlp=4, shared_width=4, experts=4, kv_heads=2)
UNIT = Arch.from_pattern(
    'M*-E',
    vocab=32768,
    embed=2048,
    mamba=Mamba(heads=64, head_dim=64, groups=8, state=128),
    attention=Attention(kv_heads=8, query_heads=4, head_dim=128),
    mlp=MLP(width=8192),
    moe=MoE(experts=16, expert_width=2048, top_k=2, shared_width=2048),
)
BUDGETS: dict[str, dict[str, int]] = {
    'full': {},
    'embed aligned': {'embed': 1024},
    'embed misaligned': {'embed': 1037},
    'mlp aligned': {'mlp': 4096},
    'mlp misaligned': {'mlp': 4148},
    'experts': {'experts': 8},
    'expert_width aligned': {'expert_width': 1024},
    'expert_width misaligned': {'expert_width': 1033},
    'shared_width misaligned': {'shared_width': 1036},
    'kv_heads': {'kv_heads': 4},
    'query_heads': {'query_heads': 2},
    'mamba_heads': {'mamba_heads': 32},
    'mamba_head_dim misaligned': {'mamba_head_dim': 36},
    'layers': {'layers': 3},
    'all aligned': {'embed': 1024, 'mlp': 4096, 'experts': 8, 'expert_width': 1024, 'mamba_heads': 32, 'kv_heads': 4},
    'all misaligned': {'embed': 1300, 'mlp': 4444, 'experts': 12, 'expert_width': 1100, 'shared_width': 1036, 'mamba_heads': 40},
}


def make_checkpoint(workdir: Path, gigabytes: float, dtype: np.dtype) -> float:
    """Writes a checkpoint of random bits of about that size. Returns seconds."""
    outside, unit = (size_of(dataclasses.replace(UNIT, mixers=UNIT.mixers[:n], ranking=()), dtype) for n in (0, 4))
    units = max(1, round((gigabytes * 1e9 - outside) / (unit - outside)))
    mixers = UNIT.mixers * units
    arch = dataclasses.replace(UNIT, mixers=mixers, ranking=())
    rng = np.random.default_rng(0)

    def leaf(param: Any) -> LazyLeaf:
        own = np.dtype(np.float32) if param.float32 else dtype
        size = int(np.prod(param.shape)) * own.itemsize
        return LazyLeaf(param.shape, own, lambda: np.frombuffer(rng.bytes(size), own).reshape(param.shape))

    manifest = Manifest(
        arch=arch, layout=LAYOUT, budgets={'full': Budget(arch, cost_of(arch).to_json())}, step=0, stage='done', stage_step=0,
        rng=[0], dtypes={'params': str(dtype)}, tokenizer={'kind': 'bytes'}, hf_config=None, data_fingerprint='',
        ordering_hash='', experiment='bench', extra={},
    )  # fmt: skip
    begun = time.perf_counter()
    save_lazily(workdir, map_table(leaf, param_table(arch, LAYOUT)), manifest)
    return time.perf_counter() - begun


def size_of(arch: Arch, dtype: np.dtype) -> int:
    table = param_table(arch, LAYOUT)
    return sum(int(np.prod(param.shape)) * (4 if param.float32 else dtype.itemsize) for _, _, param in leaves(table))


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Bytes that `work` read, its seconds, and how far it raised the process's peak of resident memory."""
    read = lambda: int(Path('/proc/self/io').read_text().split()[1])
    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # JAX itself is not what is measured
    base, before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, read(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begun
    after = read()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(result))
    return {'size': size, 'read': after - before, 'seconds': seconds, 'rss': peak * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gb', type=float, default=2.0, help='size of the checkpoint')
    parser.add_argument('--dtype', choices=('bfloat16', 'float32'), default='bfloat16')
    parser.add_argument('--dir', type=Path, help='where the checkpoint is made (default: the system folder for such files)')
    parser.add_argument('--load', nargs=2, metavar=('WORKDIR', 'WIDTHS'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        arch = open_checkpoint(args.load[0]).arch_of(widths=json.loads(args.load[1]))
        print(json.dumps(measured(lambda: jax.block_until_ready(restore_slice(args.load[0], arch)))))
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        workdir = Path(folder) / 'work'
        seconds = make_checkpoint(workdir, args.gb, np.dtype(getattr(ml_dtypes, args.dtype, args.dtype)))
        stored = sum(path.stat().st_size for path in (workdir / 'checkpoints' / '0' / 'params').rglob('*') if path.is_file())
        begun = time.perf_counter()
        shutil.copytree(workdir, Path(folder) / 'copy')
        copied = time.perf_counter() - begun
        shutil.rmtree(Path(folder) / 'copy')
        print(f'{args.dtype}: stored {stored / 1e9:.3f} GB, written in {seconds:.1f} s, copied in {copied:.1f} s')
        print(f'{"slice":26} {"GB":>6} {"read/size":>9} {"seconds":>8} {"peak RSS/size":>13}')
        depth = len(open_checkpoint(workdir).arch.mixers)
        for name, widths in BUDGETS.items():
            widths = {axis: depth * 3 // 4 if axis == 'layers' else width for axis, width in widths.items()}
            command = [sys.executable, __file__, '--load', str(workdir), json.dumps(widths)]
            line = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            ratio, rss = line['read'] / line['size'], line['rss'] / line['size']
            print(f'{name:26} {line["size"] / 1e9:6.3f} {ratio:9.4f} {line["seconds"]:8.2f} {rss:13.2f}', flush=True)


if __name__ == '__main__':
    main()
