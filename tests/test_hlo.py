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
