"""Programs for an NVIDIA GPU, lowered on any machine."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh


def lowered(run, *args):
    """The program as text, with the names of its kernels; as far as JAX itself goes, which makes Triton's code of them."""
    device = AbstractDevice(device_kind='NVIDIA H100', num_cores=None, platform='gpu')
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return jax.jit(run).trace(*args).lower(lowering_platforms=('cuda',)).as_text(debug_info=True)
