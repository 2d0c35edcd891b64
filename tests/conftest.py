"""What every test shares."""

import gc
import importlib.util
import mmap
import os
from pathlib import Path

import hypothesis
import jax
import pytest


def known_to_xla(flag: str) -> bool:
    """Whether the installed jaxlib has a flag: one that it does not know would end the process."""
    library = Path(importlib.util.find_spec('jaxlib').origin).parent / 'libjax_common.so'
    if not library.exists():
        return False
    with open(library, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        return code.find(b'\0' + flag.encode() + b'\0') >= 0  # not only among the names of flags that there were


# Tests compile a great deal and compute little: code that is not optimised, emitted the plain way, compiles in a third of the
# time. Read when the first device is asked for.
wanted = {'xla_backend_optimization_level': '0', 'xla_cpu_use_fusion_emitters': 'false'}
flags = ' '.join(f'--{flag}={value}' for flag, value in wanted.items() if known_to_xla(flag))
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()

# A mesh of eight; what does not ask for one runs on the first device.
jax.config.update('jax_num_cpu_devices', 8)
# A forgotten dimension raises instead of being broadcast.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Compiling takes as long as it takes; the same examples every time, so that a red test stays red.
hypothesis.settings.register_profile('tests', deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile('tests')


@pytest.fixture(scope='module', autouse=True)
def few_mappings():
    """Forgets compiled programs after a module when they take much of what one process may map on Linux: past that it crashes."""
    yield
    mapped, limit = Path('/proc/self/maps'), Path('/proc/sys/vm/max_map_count')
    if mapped.exists() and len(mapped.read_text().splitlines()) > int(limit.read_text()) / 3:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope='session')
def finished_run(tmp_path_factory):
    """The workdir of one finished run of the tiny experiment; tests must leave it as it is."""
    from elastic_jax.train.loop import train
    from tests.train.tiny_experiment import get_config

    workdir = tmp_path_factory.mktemp('run')
    train(get_config(), workdir)
    return workdir
