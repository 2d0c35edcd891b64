"""The GPU's kernels of the experts, interpreted: against numpy in float64, and lowered for a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elastic_jax.model import grouped
from elastic_jax.model.fetch import Summed
from elastic_jax.model.grouped_kernel import Corner
from elastic_jax.model.grouped_triton import COLUMNS, DEPTH, ROWS
from elastic_jax.model.kernels import Target
from tests.model import cuda


# A tile of each; several, of which the last is not whole; what tiles divide.
@pytest.mark.parametrize(('width', 'embed'), [(5, 7), (COLUMNS + 9, DEPTH + 40), (2 * DEPTH, COLUMNS)])
def test_experts_and_their_gradients_are_the_loop_over_experts(width, embed):
    """An expert without rows, one of several blocks, a full block; pairs that are elsewhere; what is unused is no number."""
    rng = np.random.default_rng(4)
    corner, count = Corner(2, width, embed), np.asarray([ROWS, 0, ROWS + 30, 7, 9])  # of experts 0 to 3, and elsewhere
    ids = rng.permutation(np.repeat(np.arange(5), count))[:, None]
    w = np.full((2, 3, width + 3, embed + 5), np.nan, np.float32)
    w[:, :2, :width, :embed] = rng.normal(size=(2, 2, width, embed))
    x, weight = rng.normal(size=(2, len(ids), embed)).astype(np.float32)

    @jax.jit
    def run(x, w):
        def form(x, w):
            own = Summed(w)
            network = lambda rows, matmuls: ((matmuls.out_of(matmuls.into(rows, own)[0], own)[0],), {})
            return grouped._run_by_triton(x, ids.T, 4, corner, network, grouped.Fill(), interpret=True)[0][0]

        y, backward = jax.vjp(form, x, w)
        return y, *backward(weight)

    y, dx, dw = run(x, w)
    own = np.concatenate(list(w[:, :2, :width, :embed])).astype(np.float64)
    expected, expected_dx, expected_dw = np.zeros(x.shape), np.zeros(x.shape), np.zeros(own.shape)
    for n, (e,) in enumerate(ids):
        if e < 4:
            hidden, d_hidden = own[e] @ x[n], own[e] @ weight[n]
            expected[n], expected_dx[n] = hidden @ own[e], d_hidden @ own[e]
            expected_dw[e] += np.outer(hidden, weight[n]) + np.outer(d_hidden, x[n])
    for found, right in ((y, expected), (dx, expected_dx), (dw[:, :2, :width, :embed].reshape(own.shape), expected_dw)):
        np.testing.assert_allclose(found, right, atol=2e-6 * np.abs(right).max())
    assert not dw[:, 2].any() and not dw[:, :, width:].any() and not dw[..., embed:].any()


def test_a_program_for_a_gpu_has_the_kernels_where_they_are_asked_for_and_computes_no_expert_in_vain():
    """At the published widths, in bfloat16."""
    corner, shaped = Corner(2, 1856, 2688), lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    x, w = shaped(jnp.bfloat16, 512, 2688), shaped(jnp.bfloat16, 64, 2, 1856, 2688)

    def loss(target, w, x, ids):
        network = lambda rows, matmuls, own: ((matmuls.out_of(matmuls.into(rows, own['w'])[0], own['w'])[0],), own)
        return grouped.apply_experts(x, ids, 128, corner, network, {'w': Summed(w)}, target=target)[0][0].sum()

    program = lambda target: cuda.lowered(jax.value_and_grad(functools.partial(loss, target)), w, x, shaped(jnp.int32, 6, 512))
    by_kernel, plain = program(Target('cuda', kernels=True)), program(Target('cuda'))
    for name in ('experts_into', 'experts_out', 'experts_gradient', 'xla.gpu.triton'):
        assert name in by_kernel and name not in plain
    assert 'ragged_dot' not in by_kernel and 'ragged_dot' not in plain
