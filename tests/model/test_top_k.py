"""KL from a teacher's top k and tail mass, against a float64 sum over outcomes; and what a cache keeps of a teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from elastic_jax.model.losses import Students, kl_losses, top_k_kl_losses, top_k_log_probs
from tests.model.test_losses import SHARE, T, V, draw_inputs, each

EVERYTHING = PartitionSpec()


def softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def brute_force(student, teacher, mask, count, k):
    """(KL over the k likeliest tokens and one outcome for all others, the full KL), token by token in float64."""
    p = softmax(teacher[0].astype(np.float64) @ teacher[1].astype(np.float64))
    q = softmax(student[0].astype(np.float64) @ student[1].astype(np.float64))
    coarse, full = 0.0, 0.0
    for place, weight in np.ndenumerate(mask.astype(np.float64)):
        top = np.argsort(-p[place])[:k]
        pairs = list(zip(p[place][top], q[place][top], strict=True))
        rest = np.setdiff1d(np.arange(p.shape[-1]), top)
        pairs += [(p[place][rest].sum(), q[place][rest].sum())] if len(rest) else []
        coarse += weight * sum(a * np.log(a / b) for a, b in pairs)
        full += weight * np.sum(p[place] * np.log(p[place] / q[place]))
    return coarse / count, full / count


@pytest.mark.parametrize('k', [1, 3, V - 1, V])
def test_the_loss_is_that_of_the_coarser_outcomes_and_never_above_the_full_kl(k):
    students, teacher, _, mask = draw_inputs()
    ids, log_p = top_k_log_probs(*teacher, k, chunk=4)
    _, found = top_k_kl_losses(students, SHARE, ids, log_p, mask, 5.0, chunk=4)
    for student, loss in zip(each(students), found, strict=True):
        coarse, full = brute_force(student, teacher, mask, 5.0, k)
        assert loss == pytest.approx(coarse, rel=2e-5) and coarse <= full + 1e-12
        assert (coarse == pytest.approx(full, rel=1e-9)) == (k >= V - 1)


@pytest.mark.parametrize('k', [2, V])
def test_its_gradient_is_that_of_the_coarse_loss_and_with_all_tokens_that_of_full_kl(k):
    students, teacher, _, mask = draw_inputs()
    ids, log_p = top_k_log_probs(*teacher, k)

    def written_out(students):
        p = jax.nn.softmax(teacher[0] @ teacher[1])
        top = jax.nn.one_hot(ids, V).sum(-2)
        losses = []
        for hidden, kernel in each(students):
            q = jax.nn.softmax(hidden @ kernel)
            known = (top * p * jnp.log(p / q)).sum(-1)
            rest_p, rest_q = ((1 - top) * p).sum(-1), ((1 - top) * q).sum(-1)
            rest = rest_p * jnp.log(rest_p / rest_q) if k < V else 0.0
            losses.append(((known + rest) * mask).sum() / 5.0)
        return jnp.stack(losses) @ jnp.asarray(SHARE)

    fused = lambda students: top_k_kl_losses(students, SHARE, ids, log_p, mask, 5.0, 4)[0]
    check = lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6)
    own = jax.grad(fused)(students)
    jax.tree.map(check, own, jax.grad(written_out)(students))
    if k == V:
        whole = jax.grad(lambda students: kl_losses(students, SHARE, teacher, mask, 5.0, 4)[0])(students)
        jax.tree.map(check, own, whole)


def test_a_vocabulary_that_devices_share_gives_the_same():
    rng = np.random.default_rng(3)
    vocab, k = 12, 5
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    hidden, kernel, teacher_kernel, mask = draw(2, T, 6), draw(6, vocab), draw(6, vocab), np.ones((2, T), np.float32)
    whole_ids, whole_log_p = top_k_log_probs(hidden, teacher_kernel, k, 4)
    students = lambda kernel: [Students((hidden,), kernel)]
    loss = lambda kernel: top_k_kl_losses(students(kernel), [1.0], whole_ids, whole_log_p, mask, 5.0, 4)[0]
    mesh = Mesh(np.asarray(jax.devices()[:2]), ('tensor',))

    def parts(kernel, teacher_kernel):
        ids, log_p = top_k_log_probs(hidden, teacher_kernel, k, 4, ('tensor',))
        own = lambda kernel: top_k_kl_losses(students(kernel), [1.0], ids, log_p, mask, 5.0, 4, ('tensor',))[0]
        return ids, log_p, *jax.value_and_grad(own)(kernel)

    split = PartitionSpec(None, 'tensor')
    outs = (EVERYTHING, EVERYTHING, EVERYTHING, split)
    shared = jax.shard_map(parts, mesh=mesh, in_specs=(split, split), out_specs=outs, check_vma=False)
    ids, log_p, value, grad = jax.jit(shared)(kernel, teacher_kernel)
    np.testing.assert_array_equal(ids, whole_ids)
    np.testing.assert_allclose(log_p, whole_log_p, rtol=1e-5, atol=1e-6)
    expected, expected_grad = jax.value_and_grad(loss)(kernel)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, atol=2e-6)
