"""The picture of nested widths in a terminal."""

import io
import re

import pytest

from elastic_jax.evaluate.nesting import BAR, SHADES, draw_nesting
from elastic_jax.terminal import shows, shows_colour
from tests.tiny import FAMILIES, HYBRID

SIZES = {
    'full': HYBRID,
    'mid': HYBRID.narrow({'embed': 24, 'mlp': 24}),
    'small': HYBRID.narrow({'embed': 16, 'mlp': 12, 'experts@1': 4, 'layers': 4}),
}


def test_a_bar_ends_where_each_width_does_and_says_the_numbers():
    lines = {tuple(line.split()[:-4]): line for line in draw_nesting(SIZES, HYBRID).splitlines()[1:] if 'whole' not in line}
    embed = next(line for key, line in lines.items() if 'embed' in key)
    assert [embed.count(shade) for shade in (SHADES[0], SHADES[1], SHADES[3])] == [BAR // 2, BAR // 4, BAR // 4]
    assert embed.endswith('16 24 32')
    (mlp,) = (line for line in lines.values() if line.startswith('- 3'))
    assert mlp.endswith('12 24 48')


def test_a_dropped_block_has_a_dash_and_no_share_of_the_bar():
    (experts,) = (line for line in draw_nesting(SIZES, HYBRID).splitlines() if line.startswith('E 4'))
    assert experts.endswith('- 8 8') and SHADES[0] not in experts


@pytest.mark.parametrize('name', FAMILIES)
def test_every_block_is_there_and_no_line_is_wider_than_80(name):
    arch = FAMILIES[name]
    drawn = draw_nesting({'full': arch, 'small': arch.narrow({'embed': 8})}, arch)
    assert max(map(len, drawn.splitlines())) <= 80
    named = re.findall(r'^([M*E-]) ([\d,]+)', drawn, re.MULTILINE)
    assert sorted((int(i), letter) for letter, blocks in named for i in blocks.split(',')) == list(enumerate(arch.pattern))


def test_colour_only_adds_to_the_text_and_ascii_needs_no_other_character():
    plain, coloured = (draw_nesting(SIZES, HYBRID, colour=colour) for colour in (False, True))
    assert '\x1b' not in plain and re.sub(r'\x1b\[\d+m', '', coloured) == plain != coloured
    assert draw_nesting(SIZES, HYBRID, ascii_only=True).isascii()


def test_colour_is_for_terminals_and_NO_COLOR_is_respected(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, 'isatty', lambda: True)
    monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setenv('TERM', 'xterm')
    assert shows_colour(terminal) and not shows_colour(io.StringIO())
    monkeypatch.setenv('NO_COLOR', '1')
    assert not shows_colour(terminal)
    latin = io.TextIOWrapper(io.BytesIO(), encoding='latin-1')
    assert not shows(SHADES, latin) and shows('=', latin)
