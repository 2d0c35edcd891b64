"""Which processes make up this run, as the environment tells: explicitly, or in the words of the platform. Without JAX.

Explicit, anywhere: `ELASTIC_COORDINATOR=HOST:PORT ELASTIC_PROCESSES=N ELASTIC_PROCESS_ID=I`. Otherwise JAX's own detection on
Cloud TPU (virtual machines and GKE), under Slurm (one task per process) and in Kubernetes jobs, where these really have several
processes. `ELASTIC_INITIALIZATION_TIMEOUT` and `ELASTIC_HEARTBEAT_TIMEOUT` are seconds.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic_jax.errors import UserError, WorkError

EXPLICIT = ('ELASTIC_COORDINATOR', 'ELASTIC_PROCESSES', 'ELASTIC_PROCESS_ID')
METADATA = 'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'
TPU_DEVICES = ('/dev/accel0', '/dev/vfio/0')


@dataclass(frozen=True)
class Platform:
    """What tells this process of the others. `arguments` are those of `jax.distributed.initialize`; none: JAX detects them."""

    words: str
    arguments: Mapping[str, str | int]


def platform_of(environ: Mapping[str, str]) -> Platform | None:
    """The platform of a run of several processes; None where this process is alone.

    Raises: UserError for a value that makes no sense, WorkError where the platform does not answer.
    """
    return _explicit(environ) if any(environ.get(name) for name in EXPLICIT) else _detected(environ)


def initialization_timeout(environ: Mapping[str, str]) -> int:
    """Seconds that all processes have to join: hosts of a cold pod start minutes apart."""
    return _number(environ, 'ELASTIC_INITIALIZATION_TIMEOUT', 1800, least=1)


def heartbeat_timeout(environ: Mapping[str, str]) -> int:
    """Seconds without a sign of life after which a process counts as lost."""
    return _number(environ, 'ELASTIC_HEARTBEAT_TIMEOUT', 20, least=1)


def _explicit(environ: Mapping[str, str]) -> Platform | None:
    missing = [name for name in EXPLICIT if not environ.get(name)]
    if missing == ['ELASTIC_COORDINATOR', 'ELASTIC_PROCESS_ID'] and environ['ELASTIC_PROCESSES'] == '1':
        return None
    if missing:
        raise UserError(f'{", ".join(missing)} missing in the environment: {", ".join(EXPLICIT)} go together')
    address = environ['ELASTIC_COORDINATOR']
    host, _, port = address.rpartition(':')
    if not host or not port.isdigit():
        raise UserError(f'ELASTIC_COORDINATOR={address}: expected HOST:PORT, such as 10.0.0.2:8476')
    processes = _number(environ, 'ELASTIC_PROCESSES', None, least=1)
    process = _number(environ, 'ELASTIC_PROCESS_ID', None, least=0)
    if process >= processes:
        raise UserError(f'ELASTIC_PROCESS_ID={process} of ELASTIC_PROCESSES={processes}: give 0 to {processes - 1}')
    if processes == 1:
        return None
    arguments = {'coordinator_address': address, 'num_processes': processes, 'process_id': process}
    return Platform(f'the {processes} processes with the coordinator {address}', arguments)


def _detected(environ: Mapping[str, str]) -> Platform | None:
    """The platform of a run of several processes; None on a single host."""
    if (tasks := environ.get('SLURM_NTASKS', '')).isdigit() and {'SLURM_STEP_NODELIST', 'SLURM_PROCID'} <= set(environ):
        nodes = environ['SLURM_STEP_NODELIST']
        return Platform(f'Slurm job {environ.get("SLURM_JOB_ID")} ({tasks} tasks on {nodes})', {}) if int(tasks) > 1 else None
    if workers := environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES'):
        return _tpu(workers, environ.get('MEGASCALE_NUM_SLICES'))
    if any(Path(device).exists() for device in TPU_DEVICES):
        workers = _metadata('worker-network-endpoints')
        return _tpu(workers, environ.get('MEGASCALE_NUM_SLICES') or _slices(_metadata('tpu-env')))
    if {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= set(environ):
        return _kubernetes()
    return None


def _tpu(workers: str, slices: str | None) -> Platform | None:
    hosts = [worker for worker in workers.split(',') if worker]
    count = int(slices or 1)
    if len(hosts) * count <= 1:
        return None
    return Platform(f'the TPU pod ({len(hosts)} hosts in each of {count} slice(s), first host {hosts[0]})', {})


def _slices(tpu_env: str) -> str | None:
    pairs = (line.partition(':') for line in tpu_env.splitlines())
    return next((value.strip(" '") for key, _, value in pairs if key.strip() == 'MEGASCALE_NUM_SLICES'), None)


def _metadata(attribute: str) -> str:
    """An attribute of this Google Cloud machine; '' where it has none, or is no such machine."""
    request = urllib.request.Request(METADATA + attribute, headers={'Metadata-Flavor': 'Google'})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ''
        raise WorkError(f'the metadata server answered {error.code} for {attribute}; try again, or set {EXPLICIT}') from error
    except OSError:
        return ''


def _kubernetes() -> Platform:
    try:
        import kubernetes  # noqa: F401
    except ImportError as error:
        raise UserError(
            'this pod belongs to an indexed Kubernetes job of unknown size: set ELASTIC_COORDINATOR, ELASTIC_PROCESSES and '
            'ELASTIC_PROCESS_ID as launch/README.md says (a single pod: ELASTIC_PROCESSES=1), or pip install "jax[k8s]"'
        ) from error
    return Platform('the Kubernetes job of this pod', {})


def _number(environ: Mapping[str, str], name: str, default: int | None, least: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdigit() or int(text) < least:
        raise UserError(f'{name}={text}: expected a whole number, {least} or more')
    return int(text)
