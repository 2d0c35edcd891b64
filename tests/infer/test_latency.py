"""Decode latency: the table adds up what was measured, interpolates between, keeps its file, and times a real step."""

import dataclasses
import json
import re

import pytest

from elastic_jax.arch import MLP
from elastic_jax.errors import UserError
from elastic_jax.frontier import reach
from elastic_jax.infer import latency
from elastic_jax.infer.latency import LatencyTable, Times, decode_seconds
from elastic_jax.layout import FLAT
from elastic_jax.nest.budgets import make_grid
from tests.infer.tiny import DENSE, HYBRID, random_weights

CHOICES = {
    'embed': (1.0, 0.875, 0.75, 0.5),
    'mlp': (1.0, 0.5),
    'mamba_heads': (4, 2),
    'expert_width': (8, 6, 4),
    'experts': (4, 2),
}


def invented(weights, rows, context):
    """Seconds that are multilinear in the widths, as weights are read."""
    arch = weights.arch
    own = lambda mixer: {field.name: getattr(mixer, field.name) for field in dataclasses.fields(mixer)}
    inside = [own(mixer).get('width') or own(mixer).get('heads') or own(mixer).get('expert_width') or 1 for mixer in arch.mixers]
    return 1e-3 + 1e-5 * arch.vocab * arch.embed + sum(1e-5 * arch.embed * width + 2e-5 for width in inside)


def table_of(path, arch=HYBRID):
    grid = make_grid(arch, {name: own for name, own in CHOICES.items() if name in {axis.name for axis in arch.axes()}})
    return LatencyTable(random_weights(arch).params, arch, reach([arch], [grid]), FLAT, Times(path), context=32)


def test_predictions_are_exact_where_time_is_multilinear(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, 'decode_seconds', invented)
    table = table_of(tmp_path / 'deep' / 'times.json')
    for widths in ({}, {'embed': 12}, {'embed': 14, 'mlp': 12, 'expert_width': 6}, {'mamba_heads': 2, 'layers': 3}):
        arch = HYBRID.narrow(widths)
        kept = dataclasses.replace(arch, mixers=tuple(mixer for mixer in arch.mixers if mixer is not None))
        expected = invented(dataclasses.replace(random_weights(HYBRID), arch=kept), 1, 32)
        assert table(arch) == pytest.approx(expected, rel=1e-9)
    one_block = HYBRID.narrow({'mlp@3': 12})
    assert table(HYBRID) - table(one_block) == pytest.approx(1e-5 * 16 * 12)


def test_widths_of_trained_sizes_are_reached_whatever_the_search_walks():
    grid = make_grid(HYBRID, {'mlp': (1.0, 0.5)})
    widths = reach([HYBRID, HYBRID.narrow({'embed': 12, 'expert_width@2': 4})], [grid])
    assert widths['embed'] == {12, 16} and widths['mlp'] == {12, 24} and widths['expert_width'] == {4, 8}


def test_times_are_kept_by_device_and_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, 'decode_seconds', invented)
    path = tmp_path / 'times.json'
    first = table_of(path)
    assert first.times.measured == len(first.times.own) > 10
    monkeypatch.setattr(latency, 'decode_seconds', lambda *_: pytest.fail('measured again'))
    again = table_of(path)
    assert (first.times.reused, again.times.reused) == (0, first.times.measured)
    assert again.times.measured == 0 and again(HYBRID) == first(HYBRID)
    monkeypatch.setattr(latency, 'device_key', lambda: 'another device')
    monkeypatch.setattr(latency, 'decode_seconds', lambda *args: 2 * invented(*args))
    other = table_of(path)
    assert other(HYBRID) == pytest.approx(2 * first(HYBRID)) and len(json.loads(path.read_text())['devices']) == 2
    for damage in ('{', '{"format": 7}', '[]'):
        path.write_text(damage)
        with pytest.raises(UserError, match=re.escape(str(path)) + '.*delete it'):
            Times(path)


def test_two_programs_that_measure_at_once_keep_the_times_of_both(tmp_path):
    ours, theirs = Times(tmp_path / 'times.json'), Times(tmp_path / 'times.json')
    assert ours.get('a', lambda: 1.0) == 1.0 and theirs.get('b', lambda: 2.0) == 2.0
    assert Times(tmp_path / 'times.json').own == {'a': 1.0, 'b': 2.0}


@pytest.mark.slow
def test_a_step_of_a_larger_model_is_timed_as_longer():
    narrow = dataclasses.replace(DENSE, mixers=(MLP(8),), unit_blocks=1)
    wide = dataclasses.replace(narrow, embed=512, mixers=(MLP(4096),))
    short = decode_seconds(random_weights(narrow), context=16)
    assert 0 < short < decode_seconds(random_weights(wide), context=16) < 1
