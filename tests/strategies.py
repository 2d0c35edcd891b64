"""Hypothesis strategies over submodels."""

from hypothesis import strategies as st

from elastic_jax.arch import AXES, Arch, MoE


def allowed_widths(arch: Arch, axis: str, block: int, multiple: int = 1) -> list[int]:
    """Every width that one block's axis may shrink to, multiples of `multiple` (a layout's G)."""
    mixer = arch.mixers[block]
    full = getattr(mixer, AXES[axis].field)
    step = multiple
    if axis == 'mamba_heads':
        step = mixer.groups
    elif isinstance(mixer, MoE) and axis == 'experts':
        step = mixer.groups if mixer.groups > 1 else multiple
    widths = [width for width in range(step, full + 1, step)]
    if axis == 'experts':
        per_group = max(2 if mixer.groups > 1 else 1, -(-mixer.top_k // mixer.top_groups))
        widths = [width for width in widths if width >= per_group * mixer.groups]
    return widths


@st.composite
def narrowings(draw: st.DrawFn, arch: Arch, multiple: int = 1, drop_layers: bool = True) -> dict[str, int]:
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
        common = set.intersection(*(set(allowed_widths(arch, axis.name, i, multiple)) for i in blocks))
        if common and draw(st.booleans()):
            widths[axis.name] = draw(st.sampled_from(sorted(common)))
        if draw(st.booleans()):
            i = draw(st.sampled_from(blocks))
            widths[f'{axis.name}@{i}'] = draw(st.sampled_from(allowed_widths(arch, axis.name, i, multiple)))
    return widths
