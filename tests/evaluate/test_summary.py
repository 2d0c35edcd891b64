"""The final table: costs from the closed form, the share of the gap that was closed, units a person reads."""

import math

import pytest

from elastic_jax.cost import cost_of
from elastic_jax.evaluate.summary import format_table, format_widths, gap_closed, human, summary_rows
from tests.evaluate.synthetic import ARCHS, PARENT, SCORES


def final_rows():
    after = {name: {'bits_per_byte': SCORES[name][1]} for name in ARCHS}
    before = {name: {'bits_per_byte': SCORES[name][0]} for name in ARCHS}
    return summary_rows(ARCHS, PARENT, after, before, {'bits_per_byte': 2.0}, context=256)


def test_rows_hold_the_cost_of_each_arch_and_blocks_add_up():
    rows, parent = final_rows()
    for row in [*rows, parent]:
        arch = PARENT if row['name'] == 'parent' else ARCHS[row['name']]
        cost = cost_of(arch, 256)
        assert row['parameters'] == cost.parameters
        assert row['active_parameters'] == cost.active_parameters
        assert row['bytes'] == cost.bytes and row['flops_per_token'] == cost.flops_per_token
        outside = 2 * arch.vocab * arch.embed + arch.embed  # embedding, unembedding, final norm
        assert sum(block['parameters'] for block in row['layers']) + outside == cost.parameters
        assert [block['mixer'] for block in row['layers']] == list(arch.pattern)
        for axis, widths in ((axis.name, arch.layer_widths(axis.name)) for axis in arch.axes()):
            for i, width in widths.items():
                assert row['layers'][i][axis] == width


def test_share_of_the_gap_closed():
    assert gap_closed(before=4.0, after=2.5, parent=2.0) == pytest.approx(0.75)
    assert gap_closed(before=4.0, after=1.9, parent=2.0) == pytest.approx(1.05)  # better than the parent
    assert gap_closed(before=4.0, after=4.5, parent=2.0) == pytest.approx(-0.25)  # got worse
    assert gap_closed(before=2.0, after=2.0, parent=2.0) is None  # the full budget starts as the parent
    assert gap_closed(before=math.inf, after=2.0, parent=2.0) is None
    assert gap_closed(before=4.0, after=math.nan, parent=2.0) is None
    rows, _ = final_rows()
    assert {row['name']: row['gap_closed'] for row in rows} == {
        'full': None,
        'mid': pytest.approx((3.0 - 2.2) / (3.0 - 2.0)),
        'small': pytest.approx((5.0 - 2.3) / (5.0 - 2.0)),
    }


def test_table_is_aligned_and_complete():
    rows, parent = final_rows()
    lines = format_table(rows, parent).splitlines()
    header, rule, *table = lines[:6]
    for title in ('parameters', 'active', 'bf16', 'FLOPs/token', 'bits/byte', 'before', 'gap closed'):
        end = header.index(title) + len(title)
        assert rule[end - 1] == '-' and rule[end : end + 2].strip() == ''
        column = [line[:end].split('  ')[-1].strip() for line in table if len(line) >= end]
        assert all(column), f'{title}: every cell ends where its title ends'
    small = next(line for line in table if line.startswith('small'))
    cost = cost_of(ARCHS['small'], 256)
    assert human(cost.parameters) in small and human(cost.bytes, 'B') in small and human(cost.flops_per_token) in small
    assert '2.3000' in small and '5.0000' in small and small.endswith('90 %')
    assert f'{100 * cost.parameters / cost_of(PARENT, 256).parameters:.0f} %' in small
    assert next(line for line in table if line.startswith('parent')).split()[-1] == '2.0000'
    widths = ''.join(lines[7:]).replace(' ', '')
    assert widths == ''.join(f'{row["name"]}{format_widths(row["widths"])}' for row in rows) and 'mlp@' in widths
    assert max(map(len, lines)) <= 100, 'fits a terminal'


def test_table_of_a_run_that_diverged():
    """Metrics hold non-finite numbers as strings."""
    rows, parent = final_rows()
    rows[1] |= {'bits_per_byte': 'nan', 'before_bits_per_byte': 'inf', 'gap_closed': None}
    mid = next(line for line in format_table(rows, parent).splitlines() if line.startswith('mid'))
    assert 'nan' in mid and 'inf' in mid


@pytest.mark.parametrize(
    ('value', 'unit', 'text'),
    [
        (0, '', '0'),
        (999, '', '999'),
        (1024, '', '1.02k'),
        (1_020_000, '', '1.02M'),
        (999_999, '', '1M'),
        (3_900_000, 'B', '3.9 MB'),
        (999_600, 'B', '1 MB'),
        (31.58e9, '', '31.6B'),
        (58.9e9, 'B', '58.9 GB'),
        (2.5e18, '', '2500P'),
    ],
)
def test_human_units(value, unit, text):
    assert human(value, unit) == text
