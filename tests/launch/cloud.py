"""A cloud in a folder: stand-ins for gcloud, xpk, kubectl, srun and scontrol that record their calls, and slices whose hosts are
folders, on which commands really run and processes really die.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / 'launch'

# What a stand-in for `elastic train` does, told by files in the cloud's folder: it trains until `finish` is there, or fails with
# the status in `fail`, and on SIGTERM says what the real one says.
TRAINER = """#!/usr/bin/env bash
trap 'echo "elastic: stopped at step 3 of 9, saved; run the same command to go on"; exit 0' TERM
echo "$@"
while [[ ! -e {folder}/finish ]]; do
  [[ -e {folder}/fail ]] && exit "$(<{folder}/fail)"
  sleep 0.02
done
"""


class Cloud:
    """Slices, their hosts, and what was asked of it."""

    def __init__(self, folder: Path, hosts: int = 2, launch: Path = LAUNCH):
        self.folder, self.hosts, self.launch = folder, hosts, launch
        self.bin = folder / 'bin'
        self.bin.mkdir(parents=True)
        for name in ('gcloud', 'xpk', 'kubectl', 'srun', 'scontrol', 'python3', 'hostname'):
            script = self.bin / name
            script.write_text(
                f'#!{sys.executable}\nfrom tests.launch.cloud import answer\nanswer({str(folder)!r}, {name!r}, {hosts})\n'
            )
            script.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        path = f'{self.bin}:{os.environ["PATH"]}'
        return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PATH': path, 'PYTHONPATH': str(ROOT), 'TMPDIR': str(self.folder), **more}

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        command = ['bash', str(self.launch / script), *arguments]
        pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
        return subprocess.Popen(command, cwd=ROOT, env=self.environment(**environment), **pipes)

    def call(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **environment)
        out, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, process.returncode, out, errors)

    def calls(self) -> list[list[str]]:
        """The commands that reached the cloud, in order."""
        log = self.folder / 'calls.jsonl'
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def verbs(self) -> list[str]:
        """What was asked of gcloud: create, ssh start, …"""
        found = []
        for name, *arguments in self.calls():
            if name == 'gcloud':
                command = next((a for a in arguments if a.startswith('--command=')), '')
                found.append(' '.join([arguments[3], *(['start'] if 'host.sh start' in command else [])]))
        return found

    def tell(self, name: str, text: str = '') -> None:
        (self.folder / name).write_text(text)

    def forget(self, name: str) -> None:
        (self.folder / name).unlink()

    def preempt(self, slice_name: str) -> None:
        """All hosts of a slice are gone from one moment to the next."""
        kill_hosts(self.folder / slice_name)
        self.tell(f'{slice_name}.state', 'PREEMPTED')

    def close(self) -> None:
        for state in self.folder.glob('*.state'):
            kill_hosts(self.folder / state.stem)


def kill_hosts(slice_folder: Path) -> None:
    for pid in slice_folder.glob('*/elastic_run/pid'):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except (ProcessLookupError, ValueError):
            continue


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'nothing happened'
        time.sleep(0.02)


def answer(folder: str, name: str, hosts: int) -> None:
    """The body of every stand-in."""
    arguments, cloud = sys.argv[1:], Path(folder)
    if name == 'hostname':
        print(Path.home().name)
        return
    stdin = sys.stdin.read() if name == 'kubectl' and '--filename=-' in arguments else ''
    with open(cloud / 'calls.jsonl', 'a') as log:
        log.write(json.dumps([name, *arguments, *([stdin] if stdin else [])]) + '\n')
    if name == 'python3':
        install(cloud, arguments)
    elif name == 'srun':
        print((cloud / 'srun.out').read_text(), end='')
        print('told to run:', os.environ['ELASTIC_RERUN'])
        sys.exit(int((cloud / 'srun.code').read_text()))
    elif name == 'gcloud':
        assert arguments[:3] == ['compute', 'tpus', 'tpu-vm'], arguments
        sys.exit(gcloud(cloud, hosts, arguments[3], arguments[4:]))


def install(cloud: Path, arguments: list[str]) -> None:
    """python3 -m uv venv … elastic_venv: an interpreter that stands for the trainer."""
    if arguments[:3] == ['-m', 'uv', 'venv']:
        python = Path.home() / arguments[-1] / 'bin' / 'python'
        python.parent.mkdir(parents=True)
        real = cloud / 'python'
        python.write_text(real.read_text() if real.exists() else TRAINER.format(folder=cloud))
        python.chmod(0o755)


def gcloud(cloud: Path, hosts: int, verb: str, arguments: list[str]) -> int:
    plain = [argument for argument in arguments if not argument.startswith('--')]
    flags = dict(argument[2:].partition('=')[::2] for argument in arguments if argument.startswith('--'))
    own = plain[-1].partition(':')[0]
    state, slice_folder = cloud / f'{own}.state', cloud / own
    if (cloud / 'broken').exists():
        print('ERROR: (gcloud.compute.tpus.tpu-vm) There was a problem refreshing your current auth tokens', file=sys.stderr)
        return 1
    if verb == 'create':
        full = cloud / 'full'
        if full.exists() and int(full.read_text()) > 0:
            full.write_text(str(int(full.read_text()) - 1))
            print('ERROR: There is no more capacity in the zone', file=sys.stderr)
            return 1
        assert not state.exists(), 'it is there already'
        for n in range(hosts):
            (slice_folder / f'w-{n}').mkdir(parents=True)
        state.write_text('READY')
        return 0
    if not state.exists():
        print(f"ERROR: NOT_FOUND: Resource '{own}' was not found", file=sys.stderr)
        return 1
    if verb == 'describe':
        print(state.read_text())
        return 0
    if verb == 'delete':
        kill_hosts(slice_folder)
        shutil.rmtree(slice_folder)
        state.unlink()
        return 0
    if state.read_text() != 'READY' or (cloud / 'unreachable').exists():
        print('ssh: connect to host: Connection timed out', file=sys.stderr)
        return 255
    workers = sorted(slice_folder.iterdir())
    if flags['worker'] != 'all':
        workers = [slice_folder / f'w-{flags["worker"]}']
    if verb == 'scp':
        for worker in workers:
            shutil.copy(plain[0], worker / plain[1].partition(':')[2])
        return 0
    assert verb == 'ssh', verb
    run = lambda worker: subprocess.run(
        ['bash', '-c', flags['command']], cwd=worker, env={**os.environ, 'HOME': str(worker)}, check=False
    )
    return max(run(worker).returncode for worker in workers)
