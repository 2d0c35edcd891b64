"""Runs of several real processes on this machine, through the parent that users have, and what they leave behind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from elastic_jax.checkpoint.manager import ARRAY_ITEMS, CheckpointManager
from elastic_jax.metrics import read_metrics

ROOT = Path(__file__).parents[2]
WORDS = ('quick', 'brown', 'fox', 'jumps', 'over', 'lazy', 'dogs', 'while', 'rain', 'falls', 'on', 'green', 'hills', 'and')
TIMING = ('seconds', 'tokens_per_second', 'data_seconds', 'flops_per_second')
# Machines of tests are busy: everything here is done in a tenth of this when one is not.
PATIENCE = 400
# Steps of this model take milliseconds, and a SIGTERM is looked for once a second: a run that is to be caught before its
# last step takes this many seconds for each.
PACE = 0.5
# Before `main` is called.
PACED = f"""
import time
from elastic_jax.parallel.placement import Placement
put_at_once = Placement.put_batch
def paced(self, *args):
    time.sleep({PACE})
    return put_at_once(self, *args)
Placement.put_batch = paced
"""


def write_texts(folder: Path, documents: int = 200) -> None:
    rng = random.Random(0)
    folder.mkdir()
    for n in range(documents):
        (folder / f'{n}.txt').write_text(' '.join(rng.choice(WORDS) for _ in range(rng.randint(5, 120))))


class Pod:
    """A parent and its processes, started on a workdir; `output` is all they have printed so far."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None):
        quick = {
            'PYTHONPATH': str(ROOT),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'XLA_FLAGS': '--xla_backend_optimization_level=0',
        }
        self.log, own = log, {**os.environ, **quick, **(environment or {})}
        with log.open('wb') as file:
            self.popen = subprocess.Popen(command, cwd=ROOT, env=own, stdout=file, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self.log.read_text(errors='replace')

    def processes(self) -> list[int]:
        """The process ids of the children, in the order of their start."""
        return [int(pid) for pid in Path(f'/proc/{self.popen.pid}/task/{self.popen.pid}/children').read_text().split()]

    def until(self, reached, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert self.popen.poll() is None, f'ended before {what}: {self.output[-4000:]}'
            assert time.monotonic() < deadline, f'no {what}: {self.output[-4000:]}'
            time.sleep(0.01)

    def until_step(self, workdir: Path, step: int) -> None:
        metrics = workdir / 'metrics.jsonl'
        self.until(lambda: metrics.exists() and f'"kind": "train", "step": {step},' in metrics.read_text(), f'step {step}')

    def end(self, status: int = 0) -> str:
        """Waits for the parent, which must end with `status`; returns all that was printed."""
        try:
            found = self.popen.wait(PATIENCE)
        finally:
            if self.popen.poll() is None:
                self.popen.kill()
        assert found == status, self.output[-6000:]
        return self.output


class Place:
    """A folder with texts and a compilation cache; starts pods on workdirs in it."""

    def __init__(self, root: Path):
        self.root = root
        write_texts(root / 'texts')

    def train(self, workdir: Path, *more: str) -> list[str]:
        return [
            sys.executable, '-m', 'elastic_jax', 'train',
            f'--config=tests/parallel/small_experiment.py:{self.root / "texts"}', f'--workdir={workdir}',
            f'--config.compilation_cache={self.root / "cache"}', *more,
        ]  # fmt: skip

    def scripted(self, script: str, train: list[str]) -> list[str]:
        """The command `train`, with a script that calls `main` in the place of `-m elastic_jax`."""
        path = self.root / 'script.py'
        path.write_text(script)
        return [train[0], str(path), *train[3:]]

    def start_paced(self, workdir: Path) -> Pod:
        """Two processes whose steps leave time to send them a signal."""
        call = 'import sys\nfrom elastic_jax.cli import main\nmain(sys.argv[1:])\n'
        return self.start(workdir, command=self.scripted(PACED + call, self.train(workdir)))

    def start(self, workdir: Path, *more: str, processes: int = 2, devices: int = 1, command: list[str] | None = None) -> Pod:
        supervise = [sys.executable, '-m', 'elastic_jax.parallel.supervise', f'--processes={processes}', f'--devices={devices}']
        log = workdir.parent / f'{workdir.name}.{time.monotonic_ns()}.log'
        return Pod([*supervise, '--', *(command or self.train(workdir, *more))], log)


@pytest.fixture(scope='module')
def place(tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp('pods'))


def everything(workdir: Path, step: int) -> dict:
    """All arrays of a checkpoint, its data position, and the metrics that do not tell the time."""
    manager = CheckpointManager(workdir)
    items = manager.restore(step, dict.fromkeys(ARRAY_ITEMS))
    manager.close()
    lines = [line for line in read_metrics(workdir) if line['kind'] != 'goodput']
    lines = [{key: value for key, value in line.items() if key not in TIMING} for line in lines]
    return {'items': jax.tree.map(np.asarray, items), 'lines': lines}


def assert_same(found: Path, expected: Path, step: int) -> None:
    """Bit for bit."""
    a, b = everything(found, step), everything(expected, step)
    jax.tree.map(np.testing.assert_array_equal, a['items'], b['items'])
    assert a['lines'] == b['lines']
