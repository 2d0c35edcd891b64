"""`elastic pareto` on a trained checkpoint: its three files fit each other and `elastic slice`; mistakes get one sentence."""

import csv
import json

import pytest

import elastic_jax
from elastic_jax import cost
from elastic_jax.arch import parse_widths
from elastic_jax.errors import WorkError
from elastic_jax.frontier import _chosen
from tests.test_cli import run

TINY = ('--points', 2, '--evaluations', 8, '--context', 32, '--batches', 1)
LATENCY = ('--axes', 'mlp', '--per-layer', '--cost', 'latency', '--cost-context', 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    'flags', [(), ('--axes', 'mlp', '--per-layer', '--cost', 'latency', '--cost-context', 32)], ids=['parameters', 'latency']
)
def test_the_frontier_is_written_and_its_widths_slice(capsys, finished_run, tmp_path, flags):
    out = tmp_path / 'out'
    common = ('pareto', '--checkpoint', finished_run, '--out', out, *TINY, *flags)
    status, table, err = run(capsys, *common, *(('--latency-table', tmp_path / 'times.json') if flags else ()))
    assert status == 0, err
    rows = list(csv.DictReader((out / 'frontier.csv').open()))
    assert 3 <= len(rows) <= 9 and {'full', 'mid', 'small'} <= {row['name'] for row in rows}
    assert (out / 'frontier.png').read_bytes()[:4] == b'\x89PNG'
    opened = elastic_jax.open_checkpoint(finished_run)
    pairs = [(float(row['cost']), float(row['bits_per_byte'])) for row in rows]
    for row, pair in zip(rows, pairs, strict=True):
        arch = opened.arch_of(widths=parse_widths(row['widths']))
        assert int(row['parameters']) == cost.parameters(arch)
        assert bool(flags) or pair[0] == cost.parameters(arch)
        beaten = any(a <= pair[0] and b <= pair[1] and (a, b) != pair for a, b in pairs)
        assert (row['frontier'] == '1') == (not beaten)
        if row['sliced_bits_per_byte']:
            assert float(row['sliced_bits_per_byte']) == pytest.approx(pair[1], rel=1e-5)
        assert bool(row['measured_latency']) == (bool(flags) and bool(row['sliced_bits_per_byte']))
    widths = json.loads((out / 'widths.json').read_text())
    assert widths == [row['widths'] for row in rows if row['frontier'] == '1']
    between = next(row for row in rows if row['sliced_bits_per_byte'] and row['frontier'] == '1')
    status, _, err = run(capsys, 'slice', '--checkpoint', finished_run, '--widths', between['widths'], '--out', tmp_path / 'cut')
    assert status == 0, err
    heldout = opened.heldout(None, 32, batches=1)
    score = elastic_jax.open_checkpoint(tmp_path / 'cut').load('full').evaluate(heldout)
    assert score['bits_per_byte'] == pytest.approx(float(between['bits_per_byte']), rel=1e-5)
    assert f'slice --checkpoint {opened.path}' in table and 'bits/byte' in table
    assert ('measured over predicted: median' in table) == bool(flags)


def test_a_checkpoint_of_which_no_size_scores_is_said():
    with pytest.raises(WorkError, match='no size scores a finite number'):
        _chosen([], points=3)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (('--cost', 'latncy'), "unknown cost 'latncy'; did you mean 'latency'"),
        (('--points', 0), 'points=0 must be at least 1'),
        (('--axes', 'embed,mpl'), "unknown axis 'mpl'; did you mean 'mlp'"),
        (('--dtype', 'float16'), "unknown dtype 'float16'"),
        (('--data', '/no/file.txt'), '/no/file.txt cannot be read'),
        (('--cost', 'latency', '--latency-table', 'README.md'), 'README.md is no table of layer times'),
    ],
    ids=lambda value: ' '.join(map(str, value)) if isinstance(value, tuple) else '',
)
def test_mistakes_get_one_sentence(capsys, finished_run, tmp_path, flags, message):
    status, out, err = run(capsys, 'pareto', '--checkpoint', finished_run, '--out', tmp_path / 'out', *flags)
    assert status == 2 and message in err and out == '' and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / 'out').exists()
    blocked = tmp_path / 'file'
    blocked.write_text('')
    status, _, err = run(capsys, 'pareto', '--checkpoint', finished_run, '--out', blocked / 'out')
    assert status == 2 and 'cannot be made' in err
