"""tpu_vm.sh and babysit.sh on slices whose hosts are folders: real processes, that are stopped, killed and started again."""

import contextlib
import shutil
import subprocess
import sys

import pytest

from tests.launch.cloud import ROOT, Cloud, wait_for

SLICE = ('--name', 'star', '--project', 'p', '--zone', 'z')
MAKE = (*SLICE, '--type', 'v5p-16', '--image', 'v2-alpha-tpuv5', '--spot')
RUN = ('--bucket', 'b', '--', '--config', 'c.py')


@pytest.fixture
def cloud(tmp_path):
    with contextlib.closing(Cloud(tmp_path)) as made:
        yield made


def tpu_vm(cloud, action, *arguments):
    done = cloud.call('tpu_vm.sh', action, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def statuses(cloud):
    return tpu_vm(cloud, 'status', *SLICE).splitlines()


def test_a_run_from_its_slice_to_its_end(cloud):
    assert tpu_vm(cloud, 'state', *SLICE) == 'ABSENT\n'
    tpu_vm(cloud, 'create', *MAKE)
    assert tpu_vm(cloud, 'state', *SLICE) == 'READY\n'
    tpu_vm(cloud, 'copy', *SLICE)
    assert statuses(cloud) == ['w-0 idle', 'w-1 idle']
    tpu_vm(cloud, 'run', *SLICE, *RUN)
    assert statuses(cloud) == ['w-0 running', 'w-1 running']
    tpu_vm(cloud, 'run', *SLICE, *RUN)  # once is enough
    assert tpu_vm(cloud, 'stop', *SLICE).splitlines() == ['w-0 stopped', 'w-1 stopped']
    tpu_vm(cloud, 'run', *SLICE, *RUN)
    assert statuses(cloud) == ['w-0 running', 'w-1 running']
    cloud.tell('finish')
    wait_for(lambda: statuses(cloud) == ['w-0 finished', 'w-1 finished'])
    log = tpu_vm(cloud, 'logs', *SLICE, '--worker', '1')
    assert log.count('-m elastic_jax train --config c.py --workdir=gs://b/star') == 2
    tpu_vm(cloud, 'delete', *SLICE)
    assert tpu_vm(cloud, 'state', *SLICE) == 'ABSENT\n'


@pytest.mark.parametrize('checkout', [True, False])
def test_a_checkout_travels_as_committed_and_a_plain_folder_as_it_is(tmp_path, checkout):
    tree = tmp_path / 'tree'
    for name in ('launch', 'elastic_jax', 'experiments'):
        shutil.copytree(ROOT / name, tree / name)
    for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tree)
    if checkout:
        who = ('-c', 'user.name=n', '-c', 'user.email=e@e')
        for command in (('init', '-q'), ('add', '.'), (*who, 'commit', '-q', '-m', 'm')):
            subprocess.run(['git', '-C', tree, *command], check=True)
    (tree / 'runs').mkdir()  # what a run left here
    (tree / 'elastic_jax' / 'draft.py').touch()
    with contextlib.closing(Cloud(tmp_path / 'cloud', launch=tree / 'launch')) as cloud:
        tpu_vm(cloud, 'create', *MAKE)
        tpu_vm(cloud, 'copy', *SLICE)
        for host in ('w-0', 'w-1'):
            arrived = tmp_path / 'cloud' / 'star' / host / 'elastic_jax'
            assert {'setup.cfg', 'elastic_jax', 'launch'} <= {path.name for path in arrived.iterdir()}
            assert not (arrived / 'runs').exists()
            assert (arrived / 'elastic_jax' / 'draft.py').exists() != checkout


def test_hosts_say_with_what_a_run_failed(cloud):
    tpu_vm(cloud, 'create', *MAKE)
    tpu_vm(cloud, 'copy', *SLICE)
    cloud.tell('fail', '1')
    tpu_vm(cloud, 'run', *SLICE, *RUN)
    wait_for(lambda: statuses(cloud) == ['w-0 failed 1', 'w-1 failed 1'])


def test_a_cloud_that_does_not_answer_is_no_absent_slice(cloud):
    cloud.tell('broken')
    done = cloud.call('tpu_vm.sh', 'state', *SLICE)
    assert done.returncode == 1
    assert 'ABSENT' not in done.stdout


def babysit(cloud, *options):
    return cloud.start('babysit.sh', *MAKE, '--every', '0.1', *options, *RUN)


def ended(process):
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_a_preempted_slice_is_made_again_and_the_run_goes_on(cloud):
    cloud.tell('full', '2')  # twice there is no room
    process = babysit(cloud)
    wait_for(lambda: cloud.verbs().count('ssh start') == 1)
    cloud.preempt('star')
    wait_for(lambda: cloud.verbs().count('ssh start') == 2)
    wait_for(lambda: cloud.verbs()[-1] == 'ssh')
    cloud.tell('finish')
    code, errors = ended(process)
    assert code == 0, errors
    assert 'the slice is PREEMPTED' in errors
    # Looking aside: no room twice, made, lost, made again, and left as it is at the end.
    done = [verb for verb in cloud.verbs() if verb not in ('describe', 'ssh')]
    assert done == ['create', 'create', 'create', 'scp', 'ssh start', 'delete', 'create', 'scp', 'ssh start']


def test_babysitting_can_itself_be_stopped_and_taken_up(cloud):
    first = babysit(cloud)
    wait_for(lambda: cloud.verbs().count('ssh start') == 1)
    first.terminate()
    first.communicate()
    second = babysit(cloud)
    cloud.tell('finish')
    assert ended(second)[0] == 0
    assert cloud.verbs().count('create') == cloud.verbs().count('ssh start') == 1


def test_a_run_that_lost_a_process_is_started_again_but_not_for_ever(cloud):
    cloud.tell('fail', '1')
    code, errors = ended(babysit(cloud, '--restarts', '2'))
    assert code == 1
    assert 'ended 3 times on this slice:  failed' in errors
    assert cloud.verbs().count('ssh start') == 3


def test_wrong_arguments_are_not_tried_again(cloud):
    cloud.tell('fail', '2')
    code, errors = ended(babysit(cloud))
    assert code == 1
    assert 'arguments of elastic train are wrong' in errors
    assert cloud.verbs().count('ssh start') == 1


def test_hosts_that_stay_silent_are_replaced(cloud):
    process = babysit(cloud)
    wait_for(lambda: cloud.verbs().count('ssh start') == 1)
    cloud.tell('unreachable')
    wait_for(lambda: 'delete' in cloud.verbs())
    cloud.forget('unreachable')
    cloud.tell('finish')
    code, errors = ended(process)
    assert code == 0, errors
    assert 'hosts do not answer (5 of 5)' in errors
    assert cloud.verbs().count('create') == 2


@pytest.mark.slow
def test_the_real_trainer_is_stopped_and_goes_on(tmp_path):
    with contextlib.closing(Cloud(tmp_path, hosts=1)) as cloud:
        cloud.tell('python', f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
        tpu_vm(cloud, 'create', *MAKE)
        tpu_vm(cloud, 'copy', *SLICE)
        config = ROOT / 'tests' / 'train' / 'tiny_experiment.py'
        run = (*SLICE, '--', f'--config={config}', f'--workdir={tmp_path / "run"}')
        tpu_vm(cloud, 'run', *run)
        metrics = tmp_path / 'run' / 'metrics.jsonl'
        wait_for(lambda: metrics.exists() and '"step": 4' in metrics.read_text(), 900)
        assert tpu_vm(cloud, 'stop', *SLICE) == 'w-0 stopped\n'
        tpu_vm(cloud, 'run', *run)
        wait_for(lambda: statuses(cloud) != ['w-0 running'], 900)
        assert statuses(cloud) == ['w-0 finished']
        assert 'resuming' in (tmp_path / 'star' / 'w-0' / 'elastic_run' / 'log').read_text()
