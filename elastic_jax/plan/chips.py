"""TPUs by name: the devices of a topology that is not here, as its compiler knows them, and the memory of each."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from elastic_jax.arch import unknown_name
from elastic_jax.errors import UserError

GIB = 2**30
# Memory of one device of each family, in GiB (cloud.google.com/tpu/docs; v5p and v6e as the compiler counts it). A device is a
# chip, but for v2, v3 and tpu7x half of one.
HBM_GIB = {'v2': 8, 'v3': 16, 'v4': 32, 'v5e': 16, 'v5p': 95, 'v6e': 32, 'tpu7x': 96}
# Of v4 the compiler has two devices in a chip, unless it is told to join them, as JAX on a v4 does.
JOINED = {'v4': {'chip_config_name': 'megacore'}}
EXAMPLES = ('v4:4x4x4', 'v5e:4x4', 'v5e:16x16', 'v5p:4x4x4', 'v5p:8x8x4', 'v6e:16x16', 'tpu7x:4x4x4')

# Several compilers may run at once; nobody is asked what machine this is; what is not an error is not printed.
ALONE = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': 'v5p-8',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_STDERR_LOG_LEVEL': '3',
    'TPU_MIN_LOG_LEVEL': '3',
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that can be compiled for but not run on."""

    name: str
    devices: tuple[Any, ...]

    @property
    def family(self) -> str:
        return self.name.partition(':')[0]

    @property
    def hbm_bytes(self) -> int:
        """Memory of one device."""
        return HBM_GIB[self.family] * GIB


def topology_devices(name: str) -> Topology:
    """The devices of a topology such as 'v5p:8x8x4'. No TPU is touched: JAX itself is kept on the CPU.

    Raises UserError when the name is none, or the TPU compiler is not installed.
    """
    family, _, shape = name.partition(':')
    if family not in HBM_GIB or not re.fullmatch(r'\d+(x\d+){1,2}', shape):
        raise UserError(f'{unknown_name("topology", name, list(EXAMPLES))}; write FAMILY:SHAPE in chips')
    if importlib.util.find_spec('libtpu') is None:
        raise UserError("the TPU compiler is not installed; pip install 'elastic_jax[plan]'")
    for key, value in ALONE.items():
        os.environ.setdefault(key, value)
    # The TPU compiler ends the process at a flag of another platform's.
    if 'XLA_FLAGS' in os.environ:
        flags = os.environ['XLA_FLAGS'].split()
        os.environ['XLA_FLAGS'] = ' '.join(flag for flag in flags if not flag.startswith(('--xla_cpu_', '--xla_gpu_')))
    jax.config.update('jax_platforms', 'cpu')
    try:
        found = topologies.get_topology_desc(platform='tpu', topology_name=name, **JOINED.get(family, {}))
    except (RuntimeError, ValueError) as error:
        reason = ' '.join(str(error).split())[:160]
        raise UserError(
            f'the TPU compiler knows no topology {name} ({reason}); known are such as {", ".join(EXAMPLES)}'
        ) from error
    return Topology(name, tuple(found.devices))
