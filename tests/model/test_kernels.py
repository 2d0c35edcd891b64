"""Which form of an operation a program is traced with: a device and config.kernels decide."""

from types import SimpleNamespace

import jax
import pytest

from elastic_jax.model.kernels import Target, target_of


def device(platform, kind='', version=''):
    return SimpleNamespace(platform=platform, device_kind=kind, client=SimpleNamespace(platform_version=version))


@pytest.mark.parametrize(
    ('on', 'platform', 'with_kernels'),
    [
        (device('cpu'), 'cpu', {'pallas'}),
        (SimpleNamespace(platform='tpu', device_kind='TPU v5'), 'tpu', {'auto', 'pallas'}),  # one that no client runs
        (device('gpu', version='PJRT C API\ncuda 12090'), 'cuda', {'pallas'}),
        (device('gpu', version='PJRT C API\nrocm 60300'), 'rocm', {'pallas'}),
    ],
    ids=['cpu', 'tpu', 'cuda', 'rocm'],
)
def test_kernels_are_for_those_platforms_where_they_were_timed_unless_asked_for(on, platform, with_kernels):
    for kernels in ('auto', 'xla', 'pallas'):
        assert target_of(kernels, on) == Target(platform, kernels in with_kernels)


def test_kernels_take_less_memory_where_a_core_has_less():
    old, new = (target_of('auto', device('tpu', kind)).memory for kind in ('TPU v4', 'TPU v5p'))
    assert old < 16 * 2**20 < new


def test_without_a_device_it_is_the_default_one():
    assert target_of('auto') == Target('cpu')
    for default in ('cpu', jax.devices()[1]):
        with jax.default_device(default):
            assert target_of('pallas') == Target('cpu', kernels=True)
