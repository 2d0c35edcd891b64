"""Hypothesis strategies over submodels."""

from hypothesis import strategies as st

from elastic_jax.arch import AXES, Arch
from elastic_jax.layout import FLAT, Layout


def allowed_widths(arch: Arch, axis: str, block: int, layout: Layout = FLAT) -> list[int]:
    """Every width that one block's axis may shrink to."""
    mixer = arch.mixers[block]
    step = mixer.groups if axis == 'mamba_heads' else layout.blocks(axis, mixer)
    first = step
    if axis == 'experts':
        first = max(step, mixer.groups * max(2 if mixer.groups > 1 else 1, -(-mixer.top_k // mixer.top_groups)))
        first = -(-first // step) * step
    return list(range(first, getattr(mixer, AXES[axis].field) + 1, step))


@st.composite
def narrowings(draw: st.DrawFn, arch: Arch, layout: Layout = FLAT, drop_layers: bool = True) -> dict[str, int]:
    """Widths that nest in `arch`: some axes for all blocks, some blocks apart, some units dropped."""
    widths = {}
    if draw(st.booleans()):
        widths['embed'] = draw(st.integers(1, arch.embed))
    if drop_layers and draw(st.booleans()):
        widths['layers'] = draw(st.integers(1, arch.layers))
    for axis in arch.axes():
        if axis.kind is None:
            continue
        blocks = list(arch.layer_widths(axis.name))
        common = set.intersection(*(set(allowed_widths(arch, axis.name, i, layout)) for i in blocks))
        if common and draw(st.booleans()):
            widths[axis.name] = draw(st.sampled_from(sorted(common)))
        if draw(st.booleans()):
            i = draw(st.sampled_from(blocks))
            widths[f'{axis.name}@{i}'] = draw(st.sampled_from(allowed_widths(arch, axis.name, i, layout)))
    return widths
