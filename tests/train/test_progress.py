"""Progress where there is no terminal: plain lines, on stderr in a log and on stdout in a notebook."""

import pytest

from elastic_jax.train import progress


@pytest.mark.parametrize('notebook', [False, True], ids=['log', 'notebook'])
def test_without_a_terminal_there_are_plain_lines_now_and_then(capsys, monkeypatch, notebook):
    monkeypatch.setattr(progress, 'in_notebook', lambda: notebook)
    monkeypatch.setenv('FORCE_COLOR', '1')  # as ipykernel does
    monkeypatch.setenv('COLUMNS', '20')
    with progress.RunProgress({'short': 1.0, 'long': 3.0}) as shown:
        shown.say('parent: [1.2M] parameters')
        for step in range(1, 51):
            shown.update('short', step, 50, {'full': 2.5, 'small': 3.0}, 12345.6, 0.5)
    out, err = capsys.readouterr()
    written, other = (out, err) if notebook else (err, out)
    assert other == '' and '\x1b' not in written and '\r' not in written
    first, *middle, last = written.splitlines()
    assert first == 'parent: [1.2M] parameters' and len(middle) <= 1
    # A quarter of the work took 50 steps of half a second.
    assert last == 'short 50/50  full 2.500 small 3.000  12,346 tokens/s  1m15s left'


def test_stages_before_the_one_that_goes_on_are_done(capsys, monkeypatch):
    monkeypatch.setattr(progress, 'in_notebook', lambda: False)
    shown = progress.RunProgress({'pretrain': 100.0, 'long': 10.0})
    shown.update('long', 9, 10, {}, 10.0, 1.0)
    shown.update('long', 10, 10, {}, 10.0, 1.0)
    assert capsys.readouterr().err.splitlines()[-1].endswith('0m00s left')
