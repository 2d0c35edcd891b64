"""metrics.jsonl survives damage: what cannot be read is counted and said, never passed over in silence."""

import json
from contextlib import closing

import pytest
from etils import epath

from elastic_jax.errors import UserError
from elastic_jax.evaluate.report import write_report
from elastic_jax.metrics import MetricsWriter, read_metrics
from tests.evaluate.synthetic import write_run


def damage(path, changes):
    lines = path.read_bytes().split(b'\n')
    for number, content in changes.items():
        lines[number - 1] = content
    path.write_bytes(b'\n'.join(lines))


def write(workdir, steps):
    writer = MetricsWriter(epath.Path(workdir))
    for step in steps:
        writer.write('train', step, loss=float(step))
    writer.close()
    return workdir / 'metrics.jsonl'


def test_damaged_lines_are_said_by_file_and_number_and_the_others_are_read(tmp_path, capsys):
    path = write(tmp_path, range(1, 10))
    damage(path, {3: b'{"kind": "tra', 7: b'\xff\xfe\x00'})
    said = []
    assert [line['step'] for line in read_metrics(tmp_path, said.append)] == [1, 2, 4, 5, 6, 8, 9]
    assert said == [f'{path}: 2 damaged lines are passed over (line 3, 7)']
    assert len(list(read_metrics(tmp_path))) == 7
    assert capsys.readouterr().err == f'elastic: {said[0]}\n'
    # A resumed run says it once and writes the file whole again.
    MetricsWriter(epath.Path(tmp_path), 8).close()
    assert 'line 3, 7' in capsys.readouterr().err
    assert [json.loads(line)['step'] for line in path.read_text().splitlines()] == [1, 2, 4, 5, 6, 8]
    assert len(list(read_metrics(tmp_path))) == 6
    assert capsys.readouterr().err == ''


def test_many_damaged_lines_are_counted(tmp_path):
    path, said = write(tmp_path, range(1, 20)), []
    damage(path, dict.fromkeys(range(2, 12), b'#'))
    assert len(list(read_metrics(tmp_path, said.append))) == 9
    assert said == [f'{path}: 10 damaged lines are passed over (line 2, 3, 4, 5, 6 and 5 more)']


def test_a_last_line_cut_short_by_a_kill_is_no_damage(tmp_path, capsys):
    path = write(tmp_path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-9])
    assert [line['step'] for line in read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().err == ''


def test_lines_of_another_program_are_refused(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"loss": 3}\n')
    with pytest.raises(UserError, match=r"\{'loss': 3\}.* has no kind and step"):
        MetricsWriter(epath.Path(tmp_path), 5)


def test_the_report_shows_the_damage(tmp_path):
    workdir = write_run(tmp_path / 'run')
    assert 'class="warn"' not in write_report(workdir).read_text()
    damage(workdir / 'metrics.jsonl', {4: b'{<b>'})
    assert '1 damaged line is passed over (line 4)' in write_report(workdir).read_text()


@pytest.mark.parametrize('appends', [True, False], ids=['local', 'objects'])
def test_a_run_that_ended_before_its_last_evaluation_takes_the_lines_of_that_again(tmp_path, monkeypatch, appends):
    monkeypatch.setattr('elastic_jax.metrics.appendable', lambda path: appends)
    for ended, sample in ((False, 'first'), (True, 'second')):
        with closing(MetricsWriter(epath.Path(tmp_path), 3 if ended else None, ended=ended)) as writer:
            if not ended:
                writer.write('train', 3, loss=1.0)
                writer.write('stage', 3, stage='long', event='end')
                writer.saved(3)
            writer.write('samples', 3, text=sample)
    assert [line.get('text', line['kind']) for line in read_metrics(tmp_path)] == ['train', 'stage', 'second']
