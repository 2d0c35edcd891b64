"""How the processes of one run find each other: from arguments in the environment, or as the platform says.

Explicit, anywhere: `ELASTIC_COORDINATOR=HOST:PORT ELASTIC_PROCESSES=N ELASTIC_PROCESS_ID=I`. Otherwise JAX's own detection on
Cloud TPU (virtual machines and GKE), under Slurm (one task per process) and in Kubernetes jobs, where these really have several
processes. `ELASTIC_INITIALIZATION_TIMEOUT` and `ELASTIC_HEARTBEAT_TIMEOUT` are seconds.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from elastic_jax.errors import UserError, WorkError

EXPLICIT = ('ELASTIC_COORDINATOR', 'ELASTIC_PROCESSES', 'ELASTIC_PROCESS_ID')
INITIALIZATION_TIMEOUT, HEARTBEAT_TIMEOUT = 1800, 20
METADATA = 'http://metadata.google.internal/computeMetadata/v1/instance/attributes/'
TPU_DEVICES = ('/dev/accel0', '/dev/vfio/0')


@dataclass(frozen=True)
class Platform:
    """What tells this process of the others. `arguments` are those of `jax.distributed.initialize`; none: JAX detects them."""

    words: str
    arguments: Mapping[str, str | int]


def initialize(environ: Mapping[str, str] = os.environ) -> bool:
    """Joins the other processes of this run, if the environment tells of any; returns whether it did. Call it before anything
    touches a device.

    Raises: WorkError where not all processes have joined within the time-out; UserError for a value that makes no sense.
    """
    if jax.distributed.is_initialized():
        return True
    seconds = _number(environ, 'ELASTIC_INITIALIZATION_TIMEOUT', INITIALIZATION_TIMEOUT, least=1)
    heartbeat = _number(environ, 'ELASTIC_HEARTBEAT_TIMEOUT', HEARTBEAT_TIMEOUT, least=1)
    platform = _explicit(environ) if any(environ.get(name) for name in EXPLICIT) else _detected(environ)
    if platform is None:
        return False
    _join(platform, seconds, heartbeat)
    return True


def is_main() -> bool:
    """Whether this process (number 0) writes logs and reports. It touches the devices: call `initialize` before."""
    return jax.process_index() == 0


def _join(platform: Platform, seconds: int, heartbeat: int) -> None:
    """JAX aborts the process in C++ when its own time-out ends, so that Python says nothing: it waits in a thread, for longer."""
    failures: list[BaseException] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                **platform.arguments, initialization_timeout=seconds + 60, heartbeat_timeout_seconds=heartbeat
            )
        except BaseException as error:  # what it raises belongs to the caller, whatever it is
            failures.append(error)

    thread = threading.Thread(target=join, daemon=True, name='jax.distributed.initialize')
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise WorkError(_absent(platform, seconds))
    if failures:
        reason = ' '.join(str(failures[0]).split()) or type(failures[0]).__name__
        raise WorkError(f'could not join {platform.words}: {reason}') from failures[0]


def _absent(platform: Platform, seconds: int) -> str:
    """One sentence on what did not come."""
    again = 'start all processes again, or raise ELASTIC_INITIALIZATION_TIMEOUT if hosts start late'
    address = platform.arguments.get('coordinator_address')
    if address and platform.arguments['process_id'] != 0 and not _answers(str(address)):
        return (
            f'no coordinator at {address} after {seconds} s: check that process 0 runs there and that this host can reach the '
            f'port; then {again}'
        )
    return f'not all processes of {platform.words} joined within {seconds} s: look at the logs of the missing ones; then {again}'


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(':')
    try:
        socket.create_connection((host.strip('[]'), int(port)), timeout=3).close()
    except OSError:
        return False
    return True


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
            'ELASTIC_PROCESS_ID as launch/jobset.yaml shows (a single pod: ELASTIC_PROCESSES=1), or pip install "jax[k8s]"'
        ) from error
    return Platform('the Kubernetes job of this pod', {})


def _number(environ: Mapping[str, str], name: str, default: int | None, least: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdigit() or int(text) < least:
        raise UserError(f'{name}={text}: expected a whole number, {least} or more')
    return int(text)
