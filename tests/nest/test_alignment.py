"""Misaligned widths: named once, with what whole tiles would compute, by hand."""

import pytest

from elastic_jax.arch import MLP, Arch
from elastic_jax.layout import Layout
from elastic_jax.nest.alignment import misaligned
from elastic_jax.train.prepare import on_tiles
from elastic_jax.train.setup import make_plan
from tests.train.tiny_experiment import get_config

PARENT = Arch.from_pattern('---', vocab=1000, embed=256, mlp=MLP(width=512))
SMALL = PARENT.narrow({'embed': 200, 'mlp@1': 320, 'mlp@2': 320})


def flops(embed, widths):
    """Of a token: an unembedding and, in each block, a matmul up and one down."""
    return 2 * 1000 * embed + sum(4 * embed * width for width in widths)


def test_every_misaligned_width_is_named_once_with_what_whole_tiles_compute():
    found = {(one.axis, one.width): one for one in misaligned({'full': PARENT, 'small': SMALL}, Layout(), 64, tile=128)}
    assert {one.budget for one in found.values()} == {'small'}
    assert {key: one.aligned for key, one in found.items()} == {('embed', 200): 256, ('mlp', 320): 384}
    needed = flops(200, (512, 320, 320))
    assert found['embed', 200].extra_flops == pytest.approx(256 / 200 - 1)
    assert found['mlp', 320].extra_flops == pytest.approx(flops(200, (512, 384, 384)) / needed - 1)


def test_the_blocks_of_a_layout_are_whole_tiles_each():
    (one,) = misaligned({'full': PARENT}, Layout(mlp=8), 64, tile=128)
    assert (one.tile, one.aligned) == (1024, 1024)
    assert misaligned({'full': PARENT}, Layout(mlp=4), 64, tile=128) == ()
    assert {one.aligned for one in misaligned({'small': SMALL}, Layout(), 64, tile=64)} == {256}  # embed 200; 320 is five


def test_training_says_it_of_widths_by_hand_where_there_are_tiles():
    plan = make_plan(get_config('by_hand'))
    said = on_tiles(plan, 'tpu')
    widths = {sentence.partition(' is no multiple')[0] for sentence in said}
    assert {'mid: embed=12', 'mid: mlp=16', 'small: embed=8', 'small: expert_width=16'} <= widths
    assert 'no multiple of 128, so it costs what 128 does' in said[0]
    assert on_tiles(plan, 'cpu') == []
