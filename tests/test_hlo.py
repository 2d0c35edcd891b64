"""The reader of compiled programs counts what is known in advance."""

import jax
import jax.numpy as jnp
import pytest

from elastic_jax.hlo import matmul_flops


def compiled_text(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def test_a_matmul_and_a_batched_one():
    assert matmul_flops(compiled_text(jnp.matmul, (3, 5), (5, 7))) == 2 * 3 * 5 * 7
    assert matmul_flops(compiled_text(lambda a, b: jnp.einsum('nij,njk->nik', a, b), (4, 3, 5), (4, 5, 7))) == 2 * 4 * 3 * 5 * 7


def test_loops_count_as_often_as_they_run():
    def nested(x, w):
        inner = lambda x, _: (jnp.tanh(x @ w), None)
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=3)[0] + 1.0, None)
        return jax.lax.scan(outer, x, None, length=5)[0]

    assert matmul_flops(compiled_text(nested, (4, 6), (6, 6))) == 15 * 2 * 4 * 6 * 6


def test_a_conditional_counts_its_dearest_branch():
    branch = lambda flag, x, w: jax.lax.cond(flag[0] > 0, lambda: jnp.tanh(x @ w) @ w, lambda: x @ w)
    assert matmul_flops(compiled_text(branch, (1,), (4, 6), (6, 6))) == 2 * (2 * 4 * 6 * 6)


def test_a_loop_without_a_known_end_is_refused():
    endless = lambda x, w: jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: x @ w, x)
    with pytest.raises(ValueError, match='no known trip count'):
        matmul_flops(compiled_text(endless, (4, 6), (6, 6)))
    with pytest.raises(ValueError, match='no HLO module'):
        matmul_flops('nothing of the kind')


# As the TPU compiler writes a matmul, and the batched ones: convolutions, of which only what meets the data is computed.
CONVOLUTION = """\
HloModule jit_f

ENTRY %main (x: bf16[128,64], w: bf16[64,32]) -> bf16[128,32] {{
  %x = bf16[{left}]{{1,0}} parameter(0)
  %w = bf16[{right}]{{1,0}} parameter(1)
  ROOT %y = bf16[{out}]{{1,0}} convolution(%x, %w), {how}
}}
"""


@pytest.mark.parametrize(
    ('left', 'right', 'out', 'how', 'flops'),
    [
        ('128,64', '64,32', '128,32', 'dim_labels=bf_io->bf', 2 * 128 * 64 * 32),
        (
            '4,128,64',
            '4,64,32',
            '4,128,32',
            'window={size=4 pad=0_3 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf',
            2 * 4 * 128 * 64 * 32,
        ),
        ('2,10,3', '4,3,5', '2,10,5', 'window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f', 2 * 2 * (40 - 6) * 3 * 5),
        (
            '2,10,6',
            '4,1,6',
            '2,10,6',
            'window={size=4 pad=3_0}, dim_labels=b0f_0io->b0f, feature_group_count=6',
            2 * 2 * (40 - 6) * 6,
        ),
    ],
)
def test_a_convolution_counts_what_meets_the_data(left, right, out, how, flops):
    assert matmul_flops(CONVOLUTION.format(left=left, right=right, out=out, how=how)) == flops
