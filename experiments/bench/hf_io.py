"""Import and export of a Hugging Face model of several gigabytes: megabytes per second against `cp`, and peak memory.

  python experiments/bench/hf_io.py --gigabytes 4 --folder DIR      writes and deletes about three times that in DIR

A random bfloat16 Nemotron-H (Mamba-2, experts, attention, MLP) is written to DIR; import, export of the whole model and export
of a slice then each run in a process of their own, whose peak resident memory is read from the kernel. Claim: at most
1.5 x the largest tensor + 1 GB, whatever the model's size. Processor seconds (of two or more cores, without start-up) tell how
much of the time is the machine's other work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE
from elastic_jax.checkpoint.restore import read_manifest
from elastic_jax.hf.export import export_folder
from elastic_jax.hf.from_checkpoint import export_checkpoint
from elastic_jax.hf.importing import import_checkpoint
from elastic_jax.model.params import leaves, param_table

UNIT = Arch.from_pattern(
    'ME*-',
    vocab=65536,
    embed=2048,
    mamba=Mamba(heads=64, head_dim=64, groups=8, state=128),
    attention=Attention(kv_heads=2, query_heads=16, head_dim=128),
    mlp=MLP(width=8192),
    moe=MoE(experts=64, expert_width=1024, top_k=6, shared_width=2048),
)
SMALL = {'embed': 1536, 'experts': 48, 'expert_width': 768, 'mlp': 4096, 'mamba_heads': 48}


def model_of(gigabytes: float) -> Arch:
    """As many repeats of ME*- as make about this size in bfloat16."""
    unit_bytes = sum(2 * np.prod(p.shape) for group, _, p in leaves(param_table(UNIT)) if group.startswith('layer'))
    repeats = max(1, round((gigabytes * 1e9 - 4 * UNIT.vocab * UNIT.embed) / unit_bytes))
    return Arch(UNIT.vocab, UNIT.embed, UNIT.mixers * repeats)


def make(folder: Path, gigabytes: float) -> None:
    noise, arch = np.random.default_rng(0), model_of(gigabytes)
    shape = lambda index: [cut.stop - cut.start for cut in index]
    random = lambda group, name, index: noise.standard_normal(shape(index), np.float32).astype(ml_dtypes.bfloat16)
    export_folder(folder / 'model', arch, random, dtype='bfloat16')


def run_import(folder: Path) -> None:
    import_checkpoint(folder / 'model', folder / 'checkpoint')


def run_export(folder: Path) -> None:
    export_checkpoint(folder / 'checkpoint', read_manifest(folder / 'checkpoint').arch, folder / 'full')


def run_export_slice(folder: Path) -> None:
    export_checkpoint(folder / 'checkpoint', read_manifest(folder / 'checkpoint').arch.narrow(SMALL), folder / 'small')


def run_copy(folder: Path) -> None:
    subprocess.run(['cp', '-r', folder / 'model', folder / 'copy'], check=True)


TASKS: dict[str, tuple[Callable[[Path], None], str]] = {
    'copy': (run_copy, 'copy'),
    'import': (run_import, 'checkpoint'),
    'export': (run_export, 'full'),
    'export_slice': (run_export_slice, 'small'),
}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob('*') if path.is_file())


def measure(folder: Path, task: str) -> dict[str, float]:
    """Runs one task in its own process: seconds until all is on the disk, megabytes of weights per second, peak memory."""
    command = [sys.executable, __file__, '--folder', str(folder), '--task', task]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    held = size(folder / ('small' if task == 'export_slice' else 'model'))
    return {**result, 'megabytes_per_second': held / 1e6 / result['seconds']}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--gigabytes', type=float, default=4.0)
    parser.add_argument('--folder', type=Path, required=True)
    parser.add_argument('--task', choices=TASKS)
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.task:
        start, used = time.perf_counter(), sum(os.times()[:4])
        run, written = TASKS[arguments.task]
        run(folder)
        files = [str(path) for path in (folder / written).rglob('*') if path.is_file()]
        subprocess.run(['xargs', '-0', 'sync', '-d'], input='\0'.join(files), text=True, check=True)
        seconds, used = time.perf_counter() - start, sum(os.times()[:4]) - used
        status = Path('/proc/self/status').read_text()  # ru_maxrss would count the process that started this one
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith('VmHWM'))
        print(json.dumps({'seconds': seconds, 'processor_seconds': used, 'peak_gigabytes': peak * 1024 / 1e9}))
        return
    folder.mkdir(parents=True)
    try:
        make(folder, arguments.gigabytes)
        largest = max(2 * np.prod(p.shape) for _, _, p in leaves(param_table(model_of(arguments.gigabytes))))
        result = {'model_gigabytes': size(folder / 'model') / 1e9, 'largest_tensor_gigabytes': float(largest) / 1e9}
        for task in TASKS:
            result[task] = {key: round(value, 3) for key, value in measure(folder, task).items()}
            print(task, result[task], file=sys.stderr)
            shutil.rmtree(folder / 'copy', ignore_errors=True)
        result |= {'cores': os.cpu_count(), 'load_average': os.getloadavg()[1]}  # of the last five minutes
        print(json.dumps(result, indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == '__main__':
    main()
