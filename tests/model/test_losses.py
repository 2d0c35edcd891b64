"""The fused losses against plain float64 ones over whole logits, and their gradients against autodiff of those."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.model.kernels import Target
from elastic_jax.model.losses import cross_entropy_losses, kl_losses

B, T, V, WIDTHS = 2, 11, 7, (5, 3)


def draw_inputs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    students = [(draw(B, T, d), draw(d, V)) for d in WIDTHS]
    mask = (rng.random((B, T)) < 0.7) * rng.uniform(0.5, 2.0, (B, T))
    return students, (draw(B, T, 6), draw(6, V)), rng.integers(0, V, (B, T)), mask.astype(np.float32)


def plain(students, teacher, targets, mask, count, kind):
    losses = []
    for hidden, kernel in students:
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
    share_N = jnp.asarray([0.3, 1.7])

    def fused(students):
        if kind == 'kl':
            return kl_losses(students, teacher, mask, 5.0, chunk)
        return cross_entropy_losses(students, targets, mask, 5.0, chunk)

    reference = lambda students: plain(students, teacher, targets, mask, 5.0, kind)
    np.testing.assert_allclose(jax.jit(fused)(students), reference(students), rtol=1e-5)
    gradient = lambda function: jax.jit(jax.grad(lambda students: function(students) @ share_N))(students)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient(fused), gradient(reference))


def test_no_gradient_flows_to_the_teacher():
    students, teacher, _, mask = draw_inputs()
    gradient = jax.jit(jax.grad(lambda teacher: kl_losses(students, teacher, mask, 1.0, 4).sum()))(teacher)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, np.zeros_like(leaf)), gradient)


def test_a_masked_token_may_hold_anything():
    students, teacher, _, mask = draw_inputs()
    mask[0, 3] = 0.0
    clean = kl_losses(students, teacher, mask, 1.0, 4)
    for hidden in (students[0][0], teacher[0]):
        hidden[0, 3] = np.inf
    np.testing.assert_array_equal(kl_losses(students, teacher, mask, 1.0, 4), clean)


@pytest.mark.parametrize('vocab', [300, 256, 4224], ids=['part of a tile', 'one tile', 'tiles and a part'])
def test_kernels_give_the_plain_divergence_and_gradients(vocab):
    """Far from each other, and with logits so large that their exponentials would not fit."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    students, teacher = (
        [(30 * draw(2, 48, 8), draw(8, vocab)), (draw(2, 48, 4), draw(4, vocab))],
        (9 * draw(2, 48, 6), draw(6, vocab)),
    )
    mask = (rng.random((2, 48)) < 0.7).astype(np.float32)
    losses = lambda students: kl_losses(students, teacher, mask, 5.0, 24, target=Target(kernels=True))

    assert 'pallas_call' in str(jax.make_jaxpr(losses)(students))
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (students, teacher))
        expected = plain(*double, None, mask, 5.0, 'kl')
        expected_grads = jax.grad(lambda students: plain(students, double[1], None, mask, 5.0, 'kl').sum())(double[0])
    np.testing.assert_allclose(losses(students), expected, rtol=2e-5)
    found = jax.grad(lambda students: losses(students).sum())(students)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max()), found, expected_grads)


def test_rows_that_are_no_whole_strips_take_the_plain_form():
    students, teacher, _, mask = draw_inputs()
    assert 'pallas_call' not in str(
        jax.make_jaxpr(lambda: kl_losses(students, teacher, mask, 1.0, 4, target=Target(kernels=True)))()
    )
