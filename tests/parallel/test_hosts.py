"""Separate hosts, as network namespaces with host names of their own, each with its own supervised process."""

import os
import subprocess
import time

import pytest

from tests.parallel.pods import Place, Pod, place  # noqa: F401

pytestmark = pytest.mark.slow
ADDRESSES = ('10.99.0.1', '10.99.0.11')


def ip(*arguments: str) -> None:
    done = subprocess.run(['ip', *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f'ip {" ".join(arguments)}: {done.stderr}; this test needs root and iproute2'


@pytest.fixture
def hosts(tmp_path):
    """Two namespaces joined by a cable; yields their names."""
    names = [f'elastic{os.getpid()}-{n}' for n in range(2)]
    cables = [f'e{os.getpid()}-{n}' for n in range(2)]
    try:
        for name in names:
            ip('netns', 'add', name)
        ip('link', 'add', cables[0], 'netns', names[0], 'type', 'veth', 'peer', 'name', cables[1], 'netns', names[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', cable)
            for device in (cable, 'lo'):
                ip('-n', name, 'link', 'set', device, 'up')
        yield list(zip(names, cables, strict=True))
    finally:
        for name in names:
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)


def on_host(hosts, n: int, command: list[str], place: Place, **environ: str) -> Pod:  # noqa: F811
    """`command` on one of the hosts, which know each other by name."""
    names = place.root / f'hosts{n}'
    names.write_text('127.0.0.1 localhost\n' + ''.join(f'{address} host-{i}\n' for i, address in enumerate(ADDRESSES)))
    # Its own host name and /etc/hosts, so that collectives bind to the address of the cable.
    inside = f'mount --bind {names} /etc/hosts && hostname host-{n} && exec "$@"'
    wrapped = ['ip', 'netns', 'exec', hosts[n][0], 'unshare', '--uts', '--mount', 'sh', '-c', inside, 'sh', *command]
    explicit = {
        'ELASTIC_COORDINATOR': f'{ADDRESSES[0]}:8476', 'ELASTIC_PROCESSES': '2', 'ELASTIC_PROCESS_ID': str(n),
        'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1',
    }  # fmt: skip
    return Pod(wrapped, place.root / f'host{n}.{time.monotonic_ns()}.log', explicit | environ)


def test_a_host_that_is_cut_off_leaves_nothing_hanging_and_each_host_says_what_it_knows(hosts, place):  # noqa: F811
    workdir = place.root / 'cut'
    endless = place.train(workdir, '--config.stages.pretrain.steps=1000000', '--config.checkpoint.every=1000000')
    pods = [on_host(hosts, n, endless, place, ELASTIC_RERUN='the launch script') for n in range(2)]
    pods[0].until_step(workdir, 5)
    ip('-n', hosts[1][0], 'link', 'set', hosts[1][1], 'down')
    began = time.monotonic()
    said = [pod.end(1).strip().splitlines()[-1] for pod in pods]
    assert time.monotonic() - began < 60
    assert said[0].startswith('elastic: process 1 of 2 (on host-1) was lost: no sign of life for 20 s')
    assert said[1].startswith('elastic: process 0 of 2 (on host-0), the coordinator, was lost or cannot be reached from host-1')
    assert all(sentence.endswith('run on every host: the launch script') for sentence in said)


def test_a_coordinator_that_never_appears_is_a_clear_time_out(hosts, place):  # noqa: F811
    pod = on_host(hosts, 1, place.train(place.root / 'alone'), place, ELASTIC_INITIALIZATION_TIMEOUT='6')
    assert f'elastic: no coordinator at {ADDRESSES[0]}:8476 after 6 s: check that process 0 runs there' in pod.end(1)
    assert not (place.root / 'alone').exists()


def test_hosts_with_a_workdir_of_their_own_are_told_before_anything_is_trained(place):  # noqa: F811
    apart = ['sh', '-c', ' '.join(place.train(place.root / 'own$ELASTIC_PROCESS_ID'))]
    output = place.start(place.root / 'own', command=apart).end(2)
    own = place.root / 'own'
    assert f'process 1 has another --workdir than process 0 ({own}1, not {own}0)' in output
    assert not list(place.root.glob('own[01]'))
