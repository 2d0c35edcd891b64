"""The matmul with parameters is the sum that it stands for, however many rows there are."""

import jax
import numpy as np
import pytest

from elastic_jax.model.linear import PARTS, linear


@pytest.mark.parametrize('rows', [(1,), (1, 1), (3,), (2, 1), ()], ids=str)
@pytest.mark.parametrize(('inputs', 'outputs'), [(512, (24,)), (512, (2, 3, 4)), (511, (5,)), (8, (3,))])
def test_it_is_the_sum_over_the_inputs(rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((*rows, inputs)), rng.standard_normal((inputs, *outputs))
    expected = x @ kernel.reshape(inputs, -1)
    found = jax.jit(linear)(x.astype(np.float32), kernel.astype(np.float32))
    np.testing.assert_allclose(found, expected.reshape(*rows, *outputs), atol=2e-4)


def test_a_single_row_is_summed_in_parts_on_cpu_alone():
    text = lambda rows: jax.jit(linear).lower(np.ones((rows, 512), np.float32), np.ones((512, 24), np.float32)).as_text()
    parts = f'tensor<{PARTS}x{512 // PARTS}x24xf32>'
    assert parts in text(1) and parts not in text(2)
