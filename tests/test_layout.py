"""Blocked storage: importance rank r lives at (r mod G, r div G)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax.errors import UserError
from elastic_jax.layout import FLAT, Layout, inner_width, to_blocked, to_ranked
from tests.tiny import GROUPED_MOE, HYBRID


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2), st.data())
def test_blocked_and_ranked_are_inverse_and_prefixes_stay_prefixes(blocks, per_block, axis, data):
    shape = [2, 3, 4]
    shape[axis] = blocks * per_block
    ranked = np.arange(np.prod(shape)).reshape(shape)
    blocked = to_blocked(ranked, blocks, axis)
    assert blocked.shape == (*shape[:axis], blocks, per_block, *shape[axis + 1 :])
    np.testing.assert_array_equal(to_ranked(blocked, axis), ranked)
    for rank in range(blocks * per_block):
        place = blocked.take(rank % blocks, axis).take(rank // blocks, axis)
        np.testing.assert_array_equal(place, ranked.take(rank, axis))
    # The first k of the ranks are the first k/G of every block.
    kept = data.draw(st.integers(1, per_block))
    inner_prefix = blocked.take(range(kept), axis + 1)
    np.testing.assert_array_equal(to_ranked(inner_prefix, axis), ranked.take(range(kept * blocks), axis))


def test_blocks_of_each_axis():
    layout = Layout(mlp=4, shared_width=2, experts=2, kv_heads=2)
    mamba, moe, attention, mlp, _ = HYBRID.mixers
    assert [layout.blocks('mlp', mlp), layout.blocks('experts', moe), layout.blocks('kv_heads', attention)] == [4, 2, 2]
    assert [layout.blocks('expert_width', moe), layout.blocks('mamba_heads', mamba), layout.blocks('query_heads', attention)] == [
        1
    ] * 3
    assert [inner_width(layout, 'mlp', mlp, 48), inner_width(layout, 'expert_width', moe, 16)] == [12, 16]
    assert inner_width(layout, 'mamba_heads', mamba, 8) == 4
    assert inner_width(layout, 'mlp', mlp, 6.0) == 1.5
    # Experts that are routed in groups are stored by those groups in every layout.
    grouped = GROUPED_MOE.mixers[1]
    assert [FLAT.blocks('experts', grouped), layout.blocks('experts', grouped)] == [4, 4]


def test_widths_that_break_the_layout_are_refused_with_the_nearest_that_do_not():
    with pytest.raises(UserError, match=r"mlp@3=30 is not a multiple of the layout's G=4; take 28 or 32"):
        Layout(mlp=4).check(HYBRID.narrow(mlp=30))
    with pytest.raises(UserError, match=r'kv_heads@2=1 .* G=2; take 2$'):
        Layout(kv_heads=2).check(HYBRID.narrow(kv_heads=1))
    assert Layout(mlp=4).check(HYBRID.narrow(mlp=32)) == Layout(mlp=4)
