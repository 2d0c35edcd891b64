"""The nested widths of a checkpoint's sizes as text: a bar for each axis of each block, 80 columns, readable without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elastic_jax.arch import AXES, Arch

BAR, LABEL, AXIS = 28, 13, 15
SHADES, PLAIN = '█▓▒░', '#=-.'
COLOURS = (36, 34, 35, 90)  # cyan, blue, magenta, grey: smallest first, as the shades

Widths = tuple[int, ...]


def draw_nesting(archs: Mapping[str, Arch], parent: Arch, *, colour: bool = False, ascii_only: bool = False) -> str:
    """Bars whose shades end where each size ends; blocks alike in every size share their lines.

    Args:
      archs: sizes by name; those of one shape share a shade. At most four shades: sizes between the first three and the largest
        are drawn in the last one, and their numbers still stand beside the bar.
    """
    names = sorted(archs, key=lambda name: sum(_area(archs[name])))
    shades = PLAIN if ascii_only else SHADES
    paint = lambda text, n: f'\x1b[{COLOURS[n]}m{text}\x1b[0m' if colour and text else text
    used = [shade_of(n, len(names)) for n in range(len(names))]
    legend = '   '.join(f'{paint(shades[shade] * 2, shade)} {name}' for name, shade in zip(names, used, strict=True))
    lines = [f'{"":{LABEL}}{"":{AXIS}}{legend}']

    def add(label: str, axis: str, widths: Widths, full: int) -> None:
        bar, begun = '', 0
        for width, shade in zip(widths, used, strict=True):
            end = max(begun, round(BAR * width / full))
            bar, begun = bar + paint(shades[shade] * (end - begun), shade), end
        numbers = ' '.join(str(width) if width else '-' for width in widths)
        lines.append(f'{label:{LABEL}}{axis:{AXIS}}{bar}{" " * (BAR - begun)}  {numbers}'.rstrip())

    add('all blocks', 'embed', tuple(archs[name].embed for name in names), parent.embed)
    for label, i in grouped([archs[name] for name in names], parent):
        rows = block_widths([archs[name] for name in names], parent, i)
        shrinking = {axis: widths for axis, widths in rows.items() if set(widths) != {rows_full(parent, i, axis)}}
        if not shrinking:
            lines.append(f'{label:{LABEL}}{"":{AXIS}}whole in every size')
        for n, (axis, widths) in enumerate(shrinking.items()):
            add('' if n else label, axis, widths, rows_full(parent, i, axis))
    return '\n'.join(lines)


def shade_of(n: int, count: int) -> int:
    """The shade of the n-th smallest of `count` sizes: the largest is always the lightest."""
    return len(SHADES) - 1 if n == count - 1 else min(n, len(SHADES) - 2)


def rows_full(parent: Arch, i: int, axis: str) -> int:
    """The parent's own width of one axis of one block."""
    return parent.layer_widths(axis)[i]


def block_widths(archs: Sequence[Arch], parent: Arch, i: int) -> dict[str, Widths]:
    """Axis -> the width in every size, of one block; 0 where a size dropped the block."""
    axes = [axis.name for axis in AXES.values() if parent.layer_widths(axis.name).get(i)]
    return {axis: tuple(arch.layer_widths(axis).get(i, 0) for arch in archs) for axis in axes}


def grouped(archs: Sequence[Arch], parent: Arch) -> list[tuple[str, int]]:
    """(label, first block) of every group of blocks that have the same mixer and the same widths in every size."""
    groups: dict[object, list[int]] = {}
    for i, mixer in enumerate(parent.mixers):
        if mixer is not None:
            groups.setdefault((mixer, *block_widths(archs, parent, i).items()), []).append(i)
    return [(_label(parent.pattern[blocks[0]], blocks), blocks[0]) for blocks in groups.values()]


def _label(letter: str, blocks: Sequence[int]) -> str:
    listed = ','.join(map(str, blocks))
    short = f'{blocks[0]},{blocks[1]},.. x{len(blocks)}' if len(blocks) > 1 else listed
    return f'{letter} {listed if len(listed) < LABEL - 2 else short}'


def _area(arch: Arch) -> tuple[int, ...]:
    return (arch.embed, *(sum(arch.layer_widths(axis.name).values()) for axis in arch.axes()))
