"""The fused losses against plain float64 ones over whole logits, and their gradients against autodiff of those."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.model.kernels import Target
from elastic_jax.model.losses import Students, cross_entropy_losses, kl_losses

B, T, V, WIDTHS, SHARE = 2, 11, 7, (5, 3, 3, 4), (0.3, 1.7, 0.6, 0.9)


def draw_inputs():
    """Three budgets of one unembedding, whose last row none of them uses, and one of another."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    hiddens = [draw(B, T, width) for width in WIDTHS]
    students = [Students(tuple(hiddens[:3]), draw(6, V)), Students(tuple(hiddens[3:]), draw(4, V))]
    mask = (rng.random((B, T)) < 0.7) * rng.uniform(0.5, 2.0, (B, T))
    return students, (draw(B, T, 6), draw(6, V)), rng.integers(0, V, (B, T)), mask.astype(np.float32)


def each(students):
    """(hidden states, the rows of the unembedding that go with them) of every budget."""
    return [(hidden, own.kernel_DxV[: hidden.shape[-1]]) for own in students for hidden in own.hiddens]


def plain(students, teacher, targets, mask, count, kind):
    losses = []
    for hidden, kernel in each(students):
        log_q = jax.nn.log_softmax(hidden @ kernel)
        if kind == 'kl':
            log_p = jax.nn.log_softmax(teacher[0] @ teacher[1])
            per_token = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        else:
            per_token = -jnp.take_along_axis(log_q, targets[..., None], axis=-1)[..., 0]
        losses.append((per_token * mask).sum() / count)
    return jnp.stack(losses)


@pytest.mark.parametrize('chunk', [1, 4, 11, 512])
@pytest.mark.parametrize('kind', ['kl', 'cross_entropy'])
def test_fused_losses_and_gradients_are_the_plain_ones(kind, chunk):
    students, teacher, targets, mask = draw_inputs()

    def fused(students):
        if kind == 'kl':
            return kl_losses(students, SHARE, teacher, mask, 5.0, chunk)
        return cross_entropy_losses(students, SHARE, targets, mask, 5.0, chunk)

    reference = lambda students: plain(students, teacher, targets, mask, 5.0, kind)
    weighted = lambda students: 2.5 * (reference(students) @ jnp.asarray(SHARE))
    np.testing.assert_allclose(jax.jit(fused)(students)[1], reference(students), rtol=1e-5)
    found, grads = jax.jit(jax.value_and_grad(lambda students: 2.5 * fused(students)[0]))(students)
    expected, expected_grads = jax.jit(jax.value_and_grad(weighted))(students)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), grads, expected_grads)


def test_no_gradient_flows_to_the_teacher():
    students, teacher, _, mask = draw_inputs()
    gradient = jax.jit(jax.grad(lambda teacher: kl_losses(students, SHARE, teacher, mask, 1.0, 4)[0]))(teacher)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.zeros_like(leaf)), gradient)


def test_a_masked_token_may_hold_anything():
    students, teacher, _, mask = draw_inputs()
    mask[0, 3] = 0.0
    losses = lambda: kl_losses(students, SHARE, teacher, mask, 1.0, 4)[1]
    clean = losses()
    for hidden in (students[0].hiddens[0], teacher[0]):
        hidden[0, 3] = np.inf
    np.testing.assert_array_equal(losses(), clean)


@pytest.mark.parametrize('vocab', [300, 256, 4224], ids=['part of a tile', 'one tile', 'tiles and a part'])
def test_kernels_give_the_plain_divergence_and_gradients(vocab):
    """Far from each other, and with logits so large that their exponentials would not fit."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    students, teacher = (
        [Students((30 * draw(2, 48, 8), draw(2, 48, 4)), draw(8, vocab))],
        (9 * draw(2, 48, 6), draw(6, vocab)),
    )
    mask = (rng.random((2, 48)) < 0.7).astype(np.float32)
    losses = lambda students: kl_losses(students, [1.0, 1.0], teacher, mask, 5.0, 24, target=Target(kernels=True))

    assert 'pallas_call' in str(jax.make_jaxpr(losses)(students))
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (students, teacher))
        expected = plain(*double, None, mask, 5.0, 'kl')
        expected_grads = jax.grad(lambda students: plain(students, double[1], None, mask, 5.0, 'kl').sum())(double[0])
    np.testing.assert_allclose(losses(students)[1], expected, rtol=2e-5)
    found = jax.grad(lambda students: losses(students)[0])(students)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max()), found, expected_grads)


def test_rows_that_are_no_whole_strips_take_the_plain_form():
    students, teacher, _, mask = draw_inputs()
    losses = lambda: kl_losses(students, SHARE, teacher, mask, 1.0, 4, target=Target(kernels=True))
    assert 'pallas_call' not in str(jax.make_jaxpr(losses)())
