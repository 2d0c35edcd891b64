"""What processes settle among themselves, seen from one of them: the others' words are given."""

import signal
import time

import pytest
from etils import epath

from elastic_jax.errors import UserError, WorkError
from elastic_jax.parallel import processes
from elastic_jax.parallel.processes import check_same, together
from elastic_jax.train import signals, workdir
from tests.train.tiny_experiment import get_config


@pytest.fixture
def others(monkeypatch):
    """Two more processes, which say what is in the list."""
    said = []
    monkeypatch.setattr(processes, 'are_several', lambda: True)
    monkeypatch.setattr(processes, 'gather', lambda own: [own, *said])
    return said


def refuse():
    raise UserError('there is no such file')


def test_what_fails_on_one_process_fails_on_all_with_its_words(others):
    others[:] = ['', '2 there is no such file']
    with pytest.raises(UserError, match=r'^process 2: there is no such file$'):
        together(lambda: 5)
    others[:] = ['1 the disk is full', '']
    with pytest.raises(WorkError, match=r'^process 1: the disk is full$'):
        together(lambda: 5)
    with pytest.raises(UserError, match=r'^there is no such file$'):
        together(refuse)
    others[:] = ['', '']
    assert together(lambda: 5) == 5


def test_processes_that_were_started_differently_are_told_which_and_how(others, monkeypatch):
    seen = []
    monkeypatch.setattr(processes, 'gather', lambda own: seen.append(own) or [own, own, own.replace('runs/b', 'runs/a')])
    check_same({'config': 'x' * 10_000}, 'start them alike')
    assert len(seen[0].encode()) < processes.TEXT_BYTES
    monkeypatch.setattr(processes, 'gather', lambda own: ['1 runs/a', '1 runs/a', own])
    with pytest.raises(UserError, match=r'^process 2 has another --workdir than process 0 \(runs/b, not runs/a\); start them'):
        check_same({'--workdir': 'runs/b'}, 'start them alike')


def test_one_process_asks_nobody():
    assert together(lambda: 7) == 7 and processes.gather('me') == ['me'] and processes.all_agree(True)
    check_same({'config': 'anything'}, '')


def test_a_workdir_of_one_host_alone_is_seen_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, 'SEEN_WITHIN', 0)
    with pytest.raises(UserError, match='is not the folder that process 0 writes to; take a --workdir that all hosts share'):
        workdir.check_shared(epath.Path(tmp_path / 'own'), get_config())
    workdir.claim_workdir(epath.Path(tmp_path / 'shared'), get_config())
    workdir.check_shared(epath.Path(tmp_path / 'shared'), get_config())


def test_a_signal_delivered_twice_at_once_still_saves_and_a_later_one_stops(monkeypatch):
    stop = signals.StopOnSignal()
    with stop:
        assert not stop.at(1)
        for _ in range(2):  # from the sender and from a parent that hands it on
            signal.raise_signal(signal.SIGTERM)
        assert stop.at(2)
        now = time.monotonic()
        monkeypatch.setattr(time, 'monotonic', lambda: now + 5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
