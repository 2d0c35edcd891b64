"""MFU in closed form, and devices by the names they give themselves."""

import pytest

from elastic_jax.observe.peak import peak_flops, utilisation


@pytest.mark.parametrize(
    ('kind', 'peak'),
    [
        ('TPU v4', 275e12),
        ('TPU v5 lite', 197e12),
        ('TPU v5', 459e12),
        ('TPU v5p', 459e12),
        ('TPU v6 lite', 918e12),
        ('NVIDIA H100 80GB HBM3', 989.4e12),
        ('NVIDIA H100 PCIe', 756e12),
        ('NVIDIA H200', 989.4e12),
        ('NVIDIA A100-SXM4-80GB', 312e12),
        ('NVIDIA A100 80GB PCIe', 312e12),
        ('cpu', None),
        ('TPU v55', None),
    ],
)
def test_peaks_by_device_kind(kind, peak):
    assert peak_flops(kind) == peak


def test_mfu_is_the_share_of_all_devices_peak_and_is_left_out_where_that_is_unknown():
    assert utilisation(459e12, 2.0, 4, 'TPU v5p') == pytest.approx({'flops_per_second': 229.5e12, 'mfu': 0.125})
    assert utilisation(1e9, 0.5, 2, 'cpu') == {'flops_per_second': 2e9}
