"""A workdir on an object store: nothing that a run writes is appended to, or renamed into another folder."""

import os
import sys
from pathlib import Path

import pytest

from elastic_jax.metrics import read_metrics
from elastic_jax.train.loop import train
from tests.observe.events import scalars
from tests.parallel.pods import write_texts
from tests.parallel.small_experiment import LAST_STEP, get_config

WATCHED: list[Path] = []
BROKEN: list[str] = []


def watch(event: str, arguments: tuple) -> None:
    """Python tells every audit hook of every file that is opened or renamed; hooks stay, so this one looks at WATCHED alone."""
    if not WATCHED or event not in ('open', 'os.rename', 'os.link', 'os.symlink', 'os.truncate'):
        return
    inside = [
        str(path) for path in arguments[:2] if isinstance(path, str | os.PathLike) and str(path).startswith(str(WATCHED[0]))
    ]
    if not inside:
        return
    if event == 'open':
        flags = arguments[2]
        if flags & os.O_APPEND or (flags & os.O_RDWR and not flags & os.O_TRUNC):
            BROKEN.append(f'{inside[0]} opened to be changed in place')
    elif event != 'os.rename' or len({os.path.dirname(path) for path in inside}) != 1 or len(inside) != 2:
        BROKEN.append(f'{event} {inside}')


@pytest.mark.slow
def test_a_run_and_its_resumption_write_whole_files_only(tmp_path, monkeypatch):
    write_texts(tmp_path / 'texts')
    for module in ('metrics', 'observe.sinks', 'observe.tensorboard', 'observe.profile'):
        monkeypatch.setattr(f'elastic_jax.{module}.appendable', lambda path: False)
    sys.addaudithook(watch)
    workdir = tmp_path / 'run'
    WATCHED.append(workdir)
    try:
        with (workdir.parent / 'elsewhere').open('a'):
            assert not BROKEN
        half = get_config(str(tmp_path / 'texts'))
        half.mesh.fsdp = 1
        monkeypatch.setattr('elastic_jax.train.signals.StopOnSignal.at', lambda self, step: step == 9)
        with pytest.raises(Exception, match='stopped at step 9'):
            train(half, workdir)
        monkeypatch.undo()
        for module in ('metrics', 'observe.sinks', 'observe.tensorboard', 'observe.profile'):
            monkeypatch.setattr(f'elastic_jax.{module}.appendable', lambda path: False)
        train(half, workdir)
        assert not BROKEN
        with (workdir / 'probe').open('a'):
            pass
        assert BROKEN.pop().endswith('opened to be changed in place'), 'the watch is awake'
    finally:
        WATCHED.clear()
    steps = list(range(1, LAST_STEP + 1))
    assert [line['step'] for line in read_metrics(workdir) if line['kind'] == 'train'] == steps
    assert [step for step, _ in scalars(workdir / 'tensorboard')['train/loss']] == steps
    assert (workdir / 'report.html').exists() and not (workdir / 'metrics.jsonl').exists()
