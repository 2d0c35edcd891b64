"""What the kernels for NVIDIA GPUs are compiled to, on any machine: memory and matmuls of XLA's form and of the kernels.

  pip install 'jax[cuda12]'                                 no GPU is needed, nor touched
  python experiments/bench/chip_gpu.py                      an H100, three minutes
  python experiments/bench/chip_gpu.py --pieces ssd         one of them

Forward and backward of one layer's piece at the published widths, as in chip.py. Nothing runs, so there are no times: XLA
compiles for the device that H100 describes, without the search for the best tiles of its own matmuls, which wants one. Temporary
memory is the compiler's, FLOPs are those of the matmuls in XLA's form, and registers and what of them is spilled to memory are
what NVIDIA's assembler says of each kernel.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
from chip import GIB
from chip_pieces import PIECES, Piece, both_ways
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from elastic_jax.hlo import matmul_flops
from elastic_jax.model.flash_triton import flash_attention_by_triton
from elastic_jax.model.ssd_triton import ssd_by_triton

# XLA's description of a device (GpuTargetConfigProto), by NVIDIA's published figures of an H100 SXM.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 device_memory_size: 85899345920
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
KERNELS = {'attention': flash_attention_by_triton, 'ssd': ssd_by_triton}
OURS = re.compile(r'\.entry (flash|ssd|experts)_')  # in PTX


def kernel_of(name: str) -> Callable[..., Any]:
    """The GPU's kernels for one of chip.py's pieces."""
    form = PIECES[name].plain
    return KERNELS[name.split()[0]] if name.split()[0] in KERNELS else partial(form.func, True)


def compiled(form: Callable[..., Any], piece: Piece) -> tuple[float, float, list[str]]:
    """(GiB of temporary memory, TFLOP of XLA's matmuls, what became of each kernel)."""
    jax.config.update('jax_platforms', 'cpu')
    (device,) = topologies.get_topology_desc(topology_name='', platform='cuda', target_config=H100, topology='1x1x1').devices
    args = [jax.ShapeDtypeStruct(*arg, sharding=SingleDeviceSharding(device)) for arg in (piece.out, *piece.args)]
    # Newer versions of JAX ask the mesh which GPU its Triton code is for.
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=None, platform='gpu')
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        lowered = jax.jit(both_ways(form, piece)).lower(*args)
    with tempfile.TemporaryDirectory() as folder:
        program = lowered.compile(compiler_options={'xla_dump_to': folder, 'xla_dump_emitter_re': '.*'})
        kernels = sorted(assembled(path) for path in Path(folder).glob('*.ptx') if OURS.search(path.read_text()))
    return program.memory_analysis().temp_size_in_bytes / GIB, matmul_flops(program.as_text()) / 1e12, kernels


def assembled(path: Path) -> str:
    """Of a kernel's file of PTX: 'name registers/bytes spilled', by NVIDIA's assembler."""
    program = Path(find_spec('nvidia').submodule_search_locations[0]) / 'cuda_nvcc/bin/ptxas'
    command = [str(program), '-v', '-arch=sm_90a', str(path), '-o', '/dev/null']
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    name, spilled, registers = re.search(
        r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", said, re.DOTALL
    ).groups()
    return f'{name} {registers}/{spilled}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pieces', default='', help='only pieces whose name begins so')
    wanted = parser.parse_args().pieces
    names = [name for name in PIECES if name.startswith(('attention', 'ssd', 'experts')) and name.startswith(wanted)]
    if not names:
        raise SystemExit(f'no piece begins with {wanted!r}; there are attention, ssd and experts')
    print('| piece | TFLOP needed | XLA TFLOP | GiB | kernels GiB | kernels: registers / bytes spilled |')
    print('|---|---:|---:|---:|---:|---|')
    for name in names:
        piece = PIECES[name]
        plain_gib, flops, _ = compiled(piece.plain, piece)
        gib, _, kernels = compiled(kernel_of(name), piece)
        print(
            f'| {name} | {piece.flops / 1e12:.3f} | {flops:.3f} | {plain_gib:.2f} | {gib:.2f} | {", ".join(kernels)} |',
            flush=True,
        )


if __name__ == '__main__':
    main()
