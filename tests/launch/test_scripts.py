"""The launch scripts as texts and as printers: clean, documented, and printing commands whose every flag exists."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.cloud import LAUNCH, ROOT, Cloud

SLICE = ('--name', 'star', '--project', 'p', '--zone', 'z')
SLICE_FLAGS = ('--name=star', '--project=p', '--zone=z')
TRAIN = ('--', '--config', 'experiments/quickstart.py', '--config.name=a b')
CREATE = (
    '--type',
    'v5p-128',
    '--image',
    'v2-alpha-tpuv5',
    '--spot',
    '--network',
    'n',
    '--subnetwork',
    's',
    '--service-account',
    'a',
)

# Flags in the reference of each command (cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm, xpk's workload parser,
# kubectl's and Slurm's manuals), as far as they are anything to us.
DOCUMENTED = {
    'gcloud compute tpus tpu-vm create': (
        'accelerator-type version spot preemptible network subnetwork service-account tags labels metadata data-disk '
        'topology type internal-ips reserved zone project quiet async'
    ),
    'gcloud compute tpus tpu-vm scp': 'compress force-key-file-overwrite internal-ip recurse scp-flag worker zone project quiet',
    'gcloud compute tpus tpu-vm ssh': 'command worker ssh-flag internal-ip output-directory zone project quiet',
    'gcloud compute tpus tpu-vm describe': 'format zone project quiet',
    'gcloud compute tpus tpu-vm delete': 'async zone project quiet',
    'git': 'format output',
    'tar': 'exclude',
    'xpk workload create': (
        'workload cluster project zone tpu-type device-type num-slices docker-image base-docker-image script-dir max-restarts '
        'restart-on-exit-codes termination-grace-period-seconds command env env-file priority scheduler'
    ),
    'xpk workload list': 'cluster project zone filter-by-status filter-by-job',
    'xpk workload delete': 'workload cluster project zone filter-by-job filter-by-status force',
    'kubectl apply': 'filename namespace',
    'kubectl get': 'selector output namespace',
    'kubectl logs': 'follow selector tail container prefix namespace',
    'kubectl delete': 'namespace',
    'srun': 'kill-on-bad-exit label container-image container-mounts container-workdir',
    'scontrol': '',
    '#SBATCH': 'job-name nodes ntasks-per-node gpus-per-node exclusive signal requeue open-mode output time partition',
}

DRY_RUNS = {
    'tpu_vm.sh': [
        ('create', *SLICE, *CREATE),
        ('copy', *SLICE),
        ('run', *SLICE, '--bucket', 'b', *TRAIN),
        *((action, *SLICE) for action in ('status', 'logs', 'stop', 'delete', 'state')),
    ],
    'babysit.sh': [(*SLICE, *CREATE, '--bucket=b', *TRAIN)],
    'xpk.sh': [
        ('run', *SLICE, '--cluster', 'c', '--type', 'v5p-128', '--image', 'i', '--slices', '2', '--bucket', 'b', *TRAIN),
        *((action, *SLICE, '--cluster', 'c') for action in ('status', 'logs', 'delete')),
    ],
    'jobset.sh': [
        ('run', '--name', 'star', '--image', 'i', '--bucket', 'b', *TRAIN),
        *((action, '--name', 'star') for action in ('status', 'logs', 'delete')),
    ],
    'slurm.sbatch': [('--image', 'i', *TRAIN, '--workdir', '/shared/run')],
}
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in ('.sh', '.sbatch') and path.name != 'common.sh')


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which('shellcheck') or Path(sys.executable).with_name('shellcheck')
    scripts = [str(LAUNCH / name) for name in (*SCRIPTS, 'common.sh')]
    done = subprocess.run([shellcheck, '--external-sources', *scripts], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('script', DRY_RUNS)
def test_help_is_the_header(script):
    done = subprocess.run(['bash', LAUNCH / script, '--help'], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert 'usage: ' in done.stdout
    assert '--dry-run' in done.stdout
    assert done.stdout.strip().splitlines()[0] == (LAUNCH / script).read_text().splitlines()[1].removeprefix('# ')
    assert 'source' not in done.stdout


@pytest.mark.parametrize('script', DRY_RUNS)
def test_a_dry_run_prints_commands_that_exist_and_runs_none(script, tmp_path):
    cloud = Cloud(tmp_path)
    for arguments in DRY_RUNS[script]:
        split = arguments.index('--') if '--' in arguments else len(arguments)
        done = cloud.call(script, *arguments[:split], '--dry-run', *arguments[split:])
        assert done.returncode == 0, done.stderr
        commands = [shlex.split(line) for line in done.stdout.split("<<'EOF'")[0].splitlines()]
        assert commands, arguments
        for command in commands:
            check_flags(command)
    assert cloud.calls() == []


def check_flags(command):
    line = ' '.join(command)
    known = next((name for name in DOCUMENTED if line.startswith(name)), None)
    assert known, f'{line}: an unknown command'
    if known == 'srun':  # what it runs has flags of its own
        command = command[: next(n for n, word in enumerate(command) if n and not word.startswith('--'))]
    for word in command:
        if word.startswith('--'):
            assert word[2:].partition('=')[0] in DOCUMENTED[known].split(), f'{known} has no {word}'


def test_directives_of_slurm_exist():
    directives = re.findall(r'^#SBATCH --([a-z-]+)', (LAUNCH / 'slurm.sbatch').read_text(), re.MULTILINE)
    assert {'signal', 'requeue', 'ntasks-per-node'} <= set(directives) <= set(DOCUMENTED['#SBATCH'].split())


def test_what_runs_on_the_hosts_are_the_arguments_as_given(tmp_path):
    done = Cloud(tmp_path).call('tpu_vm.sh', 'run', *SLICE, '--bucket', 'gs://b', '--dry-run', *TRAIN)
    (command,) = [word for word in shlex.split(done.stdout) if word.startswith('--command=')]
    again, script, verb, *train = shlex.split(command.removeprefix('--command='))
    assert (script, verb) == ('elastic_jax/launch/host.sh', 'start')
    assert shlex.split(again) == ['ELASTIC_RERUN=launch/tpu_vm.sh', 'run', *SLICE_FLAGS, '--bucket=gs://b', *TRAIN]
    assert train == [
        *TRAIN[1:],
        '--workdir=gs://b/star',
        '--config.compilation_cache=gs://b/compilation_cache',
    ]
    own = (*TRAIN, '--workdir=/data/x', '--config.compilation_cache=/data/c')
    done = Cloud(tmp_path / 'own').call('tpu_vm.sh', 'run', *SLICE, '--bucket', 'b', '--dry-run', *own)
    assert 'gs://b' not in done.stdout


@pytest.mark.parametrize(
    ('script', 'arguments', 'sentence'),
    [
        ('tpu_vm.sh', ('crate', *SLICE), "unknown action 'crate'"),
        ('tpu_vm.sh', ('create', *SLICE, '--image', 'v'), '--type is missing'),
        ('tpu_vm.sh', ('status', '--name', 'x'), '--project is missing'),
        ('tpu_vm.sh', ('status', *SLICE, '--zonk=3'), 'unknown option --zonk'),
        ('tpu_vm.sh', ('run', *SLICE, '--bucket', 'b'), 'the arguments of elastic train are missing'),
        ('tpu_vm.sh', ('run', *SLICE, *TRAIN), '--bucket is missing'),
        ('tpu_vm.sh', ('run', *SLICE, '--config', 'x.py'), 'unknown option --config'),
        ('babysit.sh', (*SLICE, *TRAIN), '--type is missing'),
        ('xpk.sh', ('run', *SLICE, *TRAIN), '--cluster is missing'),
        ('jobset.sh', ('run', '--name', 'x', '--bucket', 'b', *TRAIN), '--image is missing'),
        ('slurm.sbatch', ('--image',), '--image needs a value'),
    ],
)
def test_mistakes_are_one_sentence(script, arguments, sentence, tmp_path):
    cloud = Cloud(tmp_path)
    done = cloud.call(script, *arguments)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert cloud.calls() == []
