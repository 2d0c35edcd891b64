"""Event files hold every number of a run's lines once, also after a kill and a resume, also where files cannot grow."""

import numpy as np
import pytest
from etils import epath

from elastic_jax.metrics import MetricsWriter, read_metrics
from elastic_jax.observe import sinks, tensorboard
from elastic_jax.observe.tensorboard import TensorBoard
from tests.observe.events import scalars


def write(folder, steps, resume_step=None, saves=()):
    sink = TensorBoard(epath.Path(folder), resume_step)
    for step in steps:
        sink.write('train', step, {'stage': 'short', 'loss': 1.0 / step, 'loss/small': np.float32(step), 'grid': [1, 2]})
        if step in saves:
            sink.saved(step)
    return sink


def test_numbers_of_nested_lines_by_name():
    line = {
        'budget': 'small',
        'loss': 2.0,
        'rows': [1, 2],
        'note': 'x',
        'bits_per_byte': np.float32(1.5),
        'deep': {'a': {'b': 3}},
    }
    expected = {'eval/small/loss': 2.0, 'eval/small/bits_per_byte': 1.5, 'eval/small/deep/a/b': 3.0}
    assert sinks.scalars('eval', line) == expected
    assert sinks.scalars('train', {'skipped': 0, 'load': np.ones(3), 'stage': 'short'}) == {'train/skipped': 0.0}


@pytest.mark.parametrize('killed', [False, True])
def test_a_resumed_run_has_every_step_once(tmp_path, killed):
    write(tmp_path, range(1, 10)).close()
    if killed:
        path = next(tmp_path.glob('*tfevents*'))
        path.write_bytes(path.read_bytes()[:-7])
    write(tmp_path, range(7, 13), resume_step=6).close()
    write(tmp_path, [12], resume_step=11).close()
    found = scalars(tmp_path)
    assert found.keys() == {'train/loss', 'train/loss/small'}
    assert [step for step, _ in found['train/loss']] == list(range(1, 13))
    assert [value for _, value in found['train/loss']] == pytest.approx([1 / n for n in range(1, 13)])
    assert found['train/loss/small'] == [(n, float(n)) for n in range(1, 13)]


def test_a_run_from_the_start_drops_what_was_there_and_a_finished_one_writes_nothing(tmp_path):
    write(tmp_path, range(1, 10)).close()
    write(tmp_path, range(1, 4)).close()
    assert [step for step, _ in scalars(tmp_path)['train/loss']] == [1, 2, 3]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write(tmp_path, [], resume_step=3).close()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_lines_can_be_read_while_the_run_goes_on(tmp_path):
    sink = write(tmp_path, [1, 2])
    assert [step for step, _ in scalars(tmp_path)['train/loss']] == [1, 2]
    sink.close()


def test_without_appending_every_save_is_an_object_of_its_own(tmp_path, monkeypatch):
    """An object store's contract on a local path: objects are written whole, never grown or renamed."""
    for module in (tensorboard, sinks):
        monkeypatch.setattr(module, 'appendable', lambda path: False)
    monkeypatch.setattr('elastic_jax.metrics.appendable', lambda path: False)
    monkeypatch.setattr('pathlib.Path.replace', None)
    monkeypatch.setattr('pathlib.Path.open', None)

    def run(steps, saves, resume_step=None):
        board = TensorBoard(epath.Path(tmp_path / 'tensorboard'), resume_step)
        writer = MetricsWriter(epath.Path(tmp_path), resume_step, sinks=[board])
        for step in steps:
            writer.write('train', step, loss=float(step))
            if step in saves:
                writer.saved(step)
        return writer

    killed = run(range(1, 9), saves=[3, 6])  # at step 8, when what it had saved was written
    for own in (killed, *killed.sinks):
        own.uploads.close()
    run([4, 5, 6], saves=[6], resume_step=3).close()
    last = run([7, 8], saves=[], resume_step=6)
    last.saved(8)
    last.write('final', 8, loss=0.0)
    last.close()
    monkeypatch.undo()
    assert [(line['kind'], line['step']) for line in read_metrics(tmp_path)] == [('train', n) for n in range(1, 9)] + [
        ('final', 8)
    ]
    assert [step for step, _ in scalars(tmp_path / 'tensorboard')['train/loss']] == list(range(1, 9))
    assert sorted(path.name for path in (tmp_path / 'metrics').iterdir()) == [
        '000000003.jsonl',
        '000000006.jsonl',
        '000000008.jsonl',
    ]


def test_a_failed_upload_is_not_lost(tmp_path):
    (tmp_path / 'taken').write_text('a file where a folder should be')
    uploads = sinks.Uploads()
    uploads.write(epath.Path(tmp_path / 'taken' / 'object'), b'x')
    with pytest.raises(OSError):
        uploads.close()
