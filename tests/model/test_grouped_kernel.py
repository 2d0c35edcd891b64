"""The experts' kernels for TPU, interpreted: products and weights' gradients, by numpy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax.model.grouped_gradient import weight_gradient
from elastic_jax.model.grouped_kernel import Corner, grid_of, into_experts, out_of_experts
from elastic_jax.model.tiles import Chip


@pytest.mark.parametrize(
    ('width', 'embed', 'sizes', 'rows', 'block', 'memory'),
    [
        (200, 300, [70, 0, 130, 7], 256, 64, 0),  # both halves; columns in several tiles
        (264, 128, [0, 64, 63, 0], 128, 64, 2**20),
        (256, 320, [40, 0, 3, 7], 256, 128, 2**20),  # the second half has nothing to do
        (24, 40, [1500, 0, 2501, 90], 4096, 1024, 2**20),  # experts of several blocks, over the middle
        (24, 40, [5, 0, 1, 0], 384, 192, 2**20),
        (24, 40, [0, 0, 0, 0], 128, 64, 2**20),
    ],
)
def test_kernels_of_several_tiles_read_the_corner_alone(width, embed, sizes, rows, block, memory):
    """Blocks of few and of many rows; widths that no tile divides, of stored ones that none divides, by numpy in float64.

    What is not used is no number.
    """
    rng = np.random.default_rng(4)
    corner = Corner(2, width, embed)
    w = np.full((2, 3, 264, 320), np.nan, np.float32)
    w[:, :2, :width, :embed] = rng.normal(size=(2, 2, width, embed))
    rows_d, rows_f = (rng.normal(size=(rows, own)).astype(np.float32) for own in (embed, width))
    grid, chip = grid_of(jnp.asarray(sizes, jnp.int32), rows, block), Chip(memory, interpret=True)
    run = jax.jit(lambda rows, w, form: form(corner, chip, True, rows, w, w, grid)[0], static_argnames='form')
    expert = np.repeat(np.arange(4), sizes)
    own = np.concatenate(list(w[:, :2, :width, :embed])).astype(np.float64)[expert]
    into = np.einsum('rd,rfd->rf', rows_d[: len(expert)], own)
    np.testing.assert_allclose(run(rows_d, w, into_experts)[: len(expert)], into, atol=1e-4)
    out = np.einsum('rf,rfd->rd', rows_f[: len(expert)], own)
    np.testing.assert_allclose(run(rows_f, w, out_of_experts)[: len(expert)], out, atol=1e-4)


grid_jit = jax.jit(grid_of, static_argnames=('rows', 'block'))


@given(st.lists(st.sampled_from([0, 0, 1, 15, 16, 64, 70, 200]), min_size=5, max_size=5), st.integers(0, 2))
def test_halves_share_no_block_and_every_row_is_visited_once(sizes, spare):
    """Where cores run halves side by side each writes whole blocks: one in both would be a race, which the interpreter hides."""
    rows, block = 1152, 64 << spare
    grid = jax.tree.map(np.asarray, grid_jit(jnp.asarray(sizes), rows, block))
    blocks, visited = [set(), set()], []
    for h, count in enumerate(grid.visits.count_H):
        assert count <= grid.count <= grid.visits.block_HxV.shape[1]
        for v in range(grid.count):
            blocks[h].add(int(grid.visits.block_HxV[h, v]))
            if v < count:
                visited.append((int(grid.visits.expert_HxV[h, v]), int(grid.visits.block_HxV[h, v])))
    assert not blocks[0] & blocks[1] and max(blocks[0] | blocks[1]) < -(-rows // block)
    of_row = zip(np.repeat(np.arange(5), sizes), np.arange(sum(sizes)) // block, strict=True)
    assert visited == sorted({(int(expert), int(at)) for expert, at in of_row})


gradient_jit = jax.jit(
    functools.partial(weight_gradient, blocks=(5, 1), place=lambda expert: (expert, 0), chip=Chip(memory=0, interpret=True))
)


@pytest.mark.parametrize(
    ('sizes', 'rows'),
    [([700, 0, 1100, 3, 16], 2048), ([0, 0, 512, 513, 0], 1152), ([5, 250, 128, 0, 1], 384), ([0, 0, 0, 0, 0], 128)],
)
def test_gradients_of_experts_are_sums_over_their_rows_however_many(sizes, rows):
    """Of many visits, one, or none; beginning inside a tile; by numpy in float64. What belongs to nobody is no number."""
    rng = np.random.default_rng(5)
    rows_f, rows_d = (rng.normal(size=(rows, width)).astype(np.float32) for width in (24, 200))
    ends = np.cumsum(sizes)
    for own in (rows_f, rows_d):
        own[ends[-1] :] = np.nan
    found = gradient_jit(rows_f, rows_d, jnp.asarray(ends - sizes), jnp.asarray(ends))
    for expert, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        own = slice(end - size, end)
        expected = rows_f[own].astype(np.float64).T @ rows_d[own]
        np.testing.assert_allclose(found[expert, 0], expected, atol=2e-4, err_msg=str(expert))


@pytest.mark.parametrize(
    ('stored', 'width', 'embed'),
    [((2, 3, 28, 300), 24, 200), ((2, 2, 24, 256), 24, 256), ((2, 2, 9, 7), 6, 5)],
)
def test_gradients_of_experts_are_added_in_place_to_a_larger_array(stored, width, embed):
    """To the corner that is used; all else stays as it is. Several tiles, of which the last is not whole, by numpy in float64."""
    rng, sizes, rows = np.random.default_rng(6), np.asarray([70, 0, 30, 20]), 128
    onto = rng.normal(size=stored).astype(np.float32)
    rows_f, rows_d = (rng.normal(size=(rows, own)).astype(np.float32) for own in (width, embed))
    ends, expected = np.cumsum(sizes), onto.astype(np.float64)
    for own in (rows_f, rows_d):
        own[ends[-1] :] = np.nan
    for expert, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        own = slice(end - size, end)
        expected[expert // 2, expert % 2, :width, :embed] += rows_f[own].astype(np.float64).T @ rows_d[own]
    run = functools.partial(weight_gradient, blocks=(2, 2), place=Corner(2, width, embed).place, chip=Chip(0, interpret=True))
    found = jax.jit(run)(rows_f, rows_d, jnp.asarray(ends - sizes), jnp.asarray(ends), onto=onto)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    outside = np.ones(stored, bool)
    outside[:, :2, :width, :embed] = False
    np.testing.assert_array_equal(np.asarray(found)[outside], onto[outside])
