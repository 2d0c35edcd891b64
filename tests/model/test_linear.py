"""The matmul with parameters is the sum that it stands for, however many rows there are."""

import jax
import numpy as np
import pytest

from elastic_jax.model.kernels import ANYWHERE, Target
from elastic_jax.model.linear import PARTS, into, linear, out_of


@pytest.mark.parametrize('rows', [(1,), (1, 1), (3,), (2, 1), ()], ids=str)
@pytest.mark.parametrize(('inputs', 'outputs'), [(512, (24,)), (512, (2, 3, 4)), (511, (5,)), (8, (3,))])
def test_it_is_the_sum_over_the_inputs(rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((*rows, inputs)), rng.standard_normal((inputs, *outputs))
    expected = x @ kernel.reshape(inputs, -1)
    found = jax.jit(linear)(x.astype(np.float32), kernel.astype(np.float32))
    np.testing.assert_allclose(found, expected.reshape(*rows, *outputs), atol=2e-4)


@pytest.mark.parametrize('target', [ANYWHERE, Target('cpu'), Target('cpu', kernels=True)], ids=str)
@pytest.mark.parametrize('rows', [(1, 1), (2, 3)], ids=str)
def test_told_how_to_lie_in_memory_it_has_the_same_output_and_gradients(rows, target):
    rng = np.random.default_rng(0)
    x, kernel, back = (rng.standard_normal(shape).astype(np.float32) for shape in ((*rows, 512), (512, 2, 3, 4), (2, 3, 4, 512)))

    def loss(x, kernel, back):
        return (out_of(into(x, kernel, target).reshape(*rows, -1), back, target) ** 2).sum()

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, kernel, back)
    hidden = x @ kernel.reshape(512, -1)
    out = hidden @ back.reshape(-1, 512)
    np.testing.assert_allclose(value, (out**2).sum(), rtol=1e-4)
    out_grad = 2 * out
    hidden_grad = out_grad @ back.reshape(-1, 512).T
    expected = (
        hidden_grad @ kernel.reshape(512, -1).T,
        np.einsum('btd,bto->do', x, hidden_grad).reshape(kernel.shape),
        np.einsum('bto,btd->od', hidden, out_grad).reshape(back.shape),
    )
    for found, own in zip(grads, expected, strict=True):
        np.testing.assert_allclose(found, own, rtol=1e-3, atol=1e-4 * np.abs(own).max())


def test_a_single_row_is_summed_in_parts_on_cpu_alone():
    text = lambda rows: jax.jit(linear).lower(np.ones((rows, 512), np.float32), np.ones((512, 24), np.float32)).as_text()
    parts = f'tensor<{PARTS}x{512 // PARTS}x24xf32>'
    assert parts in text(1) and parts not in text(2)
