"""Slices cost their size: bytes, seconds and memory of loading and of writing slices of a random checkpoint made on the spot.

  python experiments/bench/slices.py --gb 3              # written as `elastic import` and `elastic slice` write
  python experiments/bench/slices.py --gb 3 --devices 8  # saved as a run saves it, over a mesh of 8 virtual devices; and storage

Each slice is loaded (`Checkpoint.load`) and written (`elastic slice`) in a process of its own. Bytes are those that it asked
the system to read (/proc/self/io, rchar), whatever the page cache held. Memory is the peak of the resident set while it works,
over what it was before; the kernel's mark of the peak is reset in between. The parameters are random bits, which no
compression shortens, so stored bytes are the slice's bytes. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from elastic_jax.api import open_checkpoint
from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE
from elastic_jax.checkpoint.lazy import LazyLeaf, save_lazily
from elastic_jax.checkpoint.manager import CheckpointManager
from elastic_jax.checkpoint.manifest import Budget, Manifest
from elastic_jax.cost import cost_of
from elastic_jax.layout import Layout
from elastic_jax.model.params import leaves, map_table, param_table
from elastic_jax.nest.budgets import make_grid
from elastic_jax.nest.ordering import Ordering, make_ordering
from elastic_jax.nest.router import init_router
from elastic_jax.parallel.mesh import make_mesh
from elastic_jax.parallel.sharding import param_shardings

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


NESTED = {
    'full': {},
    'mid': {'embed': 1792, 'mlp': 6144, 'experts': 12, 'expert_width': 1792, 'mamba_heads': 48},
    'small': {'embed': 1280, 'mlp': 4096, 'experts': 8, 'expert_width': 1024, 'mamba_heads': 32},
}
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5)


def model_of(gigabytes: float, dtype: np.dtype) -> Arch:
    """As many repeats of M*-E as make about this size."""
    outside, unit = (size_of(dataclasses.replace(UNIT, mixers=UNIT.mixers[:n], ranking=()), dtype) for n in (0, 4))
    units = max(1, round((gigabytes * 1e9 - outside) / (unit - outside)))
    return dataclasses.replace(UNIT, mixers=UNIT.mixers * units, ranking=())


def manifest_of(arch: Arch, dtype: np.dtype, archs: dict[str, Arch]) -> Manifest:
    return Manifest(
        arch=arch, layout=LAYOUT, budgets={name: Budget(own, cost_of(own).to_json()) for name, own in archs.items()}, step=0,
        stage='done', stage_step=0, rng=[0], dtypes={'params': str(dtype)}, tokenizer={'kind': 'bytes'}, hf_config=None,
        data_fingerprint='', ordering_hash='', experiment='bench', extra={},
    )  # fmt: skip


def make_checkpoint(workdir: Path, arch: Arch, dtype: np.dtype) -> None:
    """Writes a checkpoint of random bits, part by part."""
    rng = np.random.default_rng(0)

    def leaf(param: Any) -> LazyLeaf:
        own = np.dtype(np.float32) if param.float32 else dtype
        random = lambda index: bits(rng, [cut.stop - cut.start for cut in index], own)
        return LazyLeaf(param.shape, own, random, next((dim for dim, size in enumerate(param.shape) if size > 1), 0))

    save_lazily(workdir, map_table(leaf, param_table(arch, LAYOUT)), manifest_of(arch, dtype, {'full': arch}))


def bits(rng: np.random.Generator, shape: Any, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def save_sharded(workdir: str, gigabytes: float, dtype: np.dtype) -> None:
    """What a run saves, but for its optimiser: parameters over a mesh of 8 devices, a router, an ordering and three budgets."""
    arch, rng = model_of(gigabytes, dtype), np.random.default_rng(0)
    shardings = param_shardings(arch, LAYOUT, make_mesh({'fsdp': 2, 'expert': 2, 'tensor': 2}))
    params: dict[str, Any] = map_table(lambda _: None, param_table(arch, LAYOUT))
    for group, name, param in leaves(param_table(arch, LAYOUT)):
        own = np.dtype(np.float32) if param.float32 else dtype
        full = bits(rng, param.shape, own)
        place = lambda index, full=full: full[index]
        params[group][name] = jax.make_array_from_callback(param.shape, shardings[group][name], place)
    axes = ('embed', 'mamba_heads', 'mlp', 'experts', 'expert_width', 'shared_width')
    grid = make_grid(arch, dict.fromkeys(axes, SHARES), ('mlp', 'expert_width'), LAYOUT, 128)
    archs = {name: arch.narrow(widths) for name, widths in NESTED.items()}
    manager = CheckpointManager(workdir)
    manager.save(
        0, params=params, opt_state={}, router=init_router(jax.random.key(0), grid, len(NESTED)),
        ordering=random_ordering(arch), data={}, manifest=manifest_of(arch, dtype, archs),
    )  # fmt: skip
    manager.close()


def random_ordering(arch: Arch) -> Ordering:
    """A permutation of every axis, in the shapes of `importance.scores`."""
    scores: dict[str, dict[str, Any]] = {'embedding': {'embed': (arch.embed,)}}
    for group, mixer in zip((f'layer_{i:03}' for i in range(len(arch.mixers))), arch.mixers, strict=True):
        if isinstance(mixer, Mamba):
            scores[group] = {'mamba_head_dim': (mixer.head_dim,), 'mamba_heads': (mixer.groups, mixer.heads // mixer.groups)}
        elif isinstance(mixer, Attention):
            scores[group] = {'query_heads': (mixer.kv_heads, mixer.query_heads), 'kv_heads': (mixer.kv_heads,)}
        elif isinstance(mixer, MLP):
            scores[group] = {'mlp': (mixer.width,)}
        elif isinstance(mixer, MoE):
            own = {'experts': (mixer.experts,), 'expert_width': (mixer.experts, mixer.expert_width)}
            scores[group] = own | {'shared_width': (mixer.shared_width,)}
    rng = np.random.default_rng(0)
    return make_ordering({group: {axis: rng.random(shape) for axis, shape in own.items()} for group, own in scores.items()}, arch)


def storage(step: Path, arch: Arch, dtype: np.dtype) -> None:
    """One checkpoint of three budgets against three checkpoints, and what it has beside the parent's own bytes."""
    bare, nested = size_of(arch, dtype), [size_of(arch.narrow(widths), dtype) for widths in NESTED.values()]
    items = {item.name: size_on_disk(item) for item in step.iterdir() if item.is_dir()}
    total = size_on_disk(step)
    names, apart = ', '.join(NESTED), sum(nested)
    print(f'one checkpoint: {total / 1e9:.3f} GB; {names} apart: {apart / 1e9:.3f} GB; ratio {total / apart:.3f}')
    print(f'over the parent: {100 * (total / bare - 1):.2f} %; bytes: bare {bare}, {items}')


def size_on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())


def size_of(arch: Arch, dtype: np.dtype) -> int:
    table = param_table(arch, LAYOUT)
    return sum(int(np.prod(param.shape)) * (4 if param.float32 else dtype.itemsize) for _, _, param in leaves(table))


def load(workdir: str, widths: dict[str, int]) -> None:
    jax.block_until_ready(open_checkpoint(workdir).load(widths=widths).params)


def write(workdir: str, widths: dict[str, int]) -> None:
    open_checkpoint(workdir).slice(None, Path(workdir).parent / 'slice', widths=widths)


WORK = {'load': load, 'slice': write}


def measure(name: str, workdir: str, widths: dict[str, int]) -> dict[str, float]:
    """Bytes that the work read, its seconds, and how far resident memory rose above where it was."""
    jax.block_until_ready(jax.numpy.zeros(1) + 1)  # JAX itself is not what is measured
    Path('/proc/self/clear_refs').write_text('5')  # the peak begins anew
    resting, before, begun = status('VmRSS'), bytes_read(), time.perf_counter()
    WORK[name](workdir, widths)
    seconds = time.perf_counter() - begun
    return {'read': bytes_read() - before, 'seconds': seconds, 'peak': status('VmHWM') - resting}


def bytes_read() -> int:
    return int(Path('/proc/self/io').read_text().split()[1])


def status(field: str) -> int:
    """Bytes that the kernel counts under this name for this process."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f'{field}:')) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--gb', type=float, default=2.0, help='size of the checkpoint')
    parser.add_argument('--dtype', choices=('bfloat16', 'float32'), default='bfloat16')
    parser.add_argument('--dir', type=Path, help='where the checkpoint is made (default: the system folder for such files)')
    parser.add_argument('--devices', type=int, choices=(1, 8), default=1, help='8: saved from a mesh of 8 virtual devices')
    parser.add_argument('--work', nargs=3, metavar=('NAME', 'WORKDIR', 'WIDTHS'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = np.dtype(getattr(ml_dtypes, args.dtype, args.dtype))
    if args.work:
        name, workdir, widths = args.work
        if name == 'save':
            jax.config.update('jax_num_cpu_devices', 8)
            save_sharded(workdir, args.gb, dtype)
        else:
            print(json.dumps(measure(name, workdir, json.loads(widths))))
        return
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        workdir, parent = Path(folder) / 'work', model_of(args.gb, dtype)
        begun = time.perf_counter()
        if args.devices == 1:
            make_checkpoint(workdir, parent, dtype)
        else:
            same = [f'--gb={args.gb}', f'--dtype={args.dtype}']
            subprocess.run([sys.executable, __file__, *same, '--work', 'save', str(workdir), ''], check=True)
        seconds, step = time.perf_counter() - begun, workdir / 'checkpoints' / '0'
        stored = size_on_disk(step / 'params')
        os.sync()
        begun = time.perf_counter()
        shutil.copytree(workdir, Path(folder) / 'copy')
        copied = time.perf_counter() - begun
        shutil.rmtree(Path(folder) / 'copy')
        over = 100 * (stored / size_of(parent, dtype) - 1)
        print(f'{args.dtype}: stored {stored / 1e9:.3f} GB ({over:.2f} % over), written {seconds:.1f} s, copied {copied:.1f} s')
        if args.devices > 1:
            storage(step, parent, dtype)
        print('peak: GB of resident memory over what it was; over size: that less 1.2 x the slice, which may be 0.2 at most')
        print(f'{"slice":26} {"GB":>6} {"work":>5} {"read/size":>9} {"seconds":>8} {"peak":>6} {"over size":>9}')
        for name, widths in BUDGETS.items():
            widths = {axis: len(parent.mixers) * 3 // 4 if axis == 'layers' else width for axis, width in widths.items()}
            size = size_of(parent.narrow(widths), dtype)
            for work in WORK:
                command = [sys.executable, __file__, '--work', work, str(workdir), json.dumps(widths)]
                done = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                shutil.rmtree(Path(folder) / 'slice', ignore_errors=True)
                over = (done['peak'] - 1.2 * size) / 1e9
                print(
                    f'{name:26} {size / 1e9:6.3f} {work:>5} {done["read"] / size:9.4f} {done["seconds"]:8.2f} '
                    f'{done["peak"] / 1e9:6.3f} {over:9.3f}',
                    flush=True,
                )


if __name__ == '__main__':
    main()
