"""Adding a mixer: one call makes a new kind of block known to everything that derives from the tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from elastic_jax.arch import AXES, LETTERS, Axis
from elastic_jax.errors import UserError
from elastic_jax.model.context import Mixed
from elastic_jax.model.decoder import APPLY
from elastic_jax.model.params import DECLARE, Declare


def register_mixer(kind: type, letter: str, axes: Mapping[str, str], declare: Declare, apply: Callable[..., Mixed]) -> None:
    """Makes a mixer known: it can then be initialised, sharded, sliced, masked, ordered, costed, searched, trained and stored.

    Call it where the experiment's config file is imported. The mixer may hold no cache: it must see all it needs in one pass.

    Args:
      kind: a frozen dataclass, the description of one block; its name in lower case is its key in `config.arch`.
      letter: that stands for it in patterns.
      axes: elastic axis -> the field of `kind` that holds its width. No mixer may have the axis already.
      declare: (mixer, embed width, layout, depth scale) -> its parameters, all but the norm, which every block has. Each elastic
        dimension goes by its axis's name, and `mask` names the axes of the units that a parameter produces.
      apply: (params, x_BxTxD, mixer, context, cache, soft) -> Mixed; with `context.taps` it returns, under each axis's name, the
        activations [B, T, width] whose mean size is the importance of a unit.
    Raises: UserError when the letter, an axis or the name is taken, or `kind` is not a frozen dataclass with these fields.
    """
    if not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen:
        raise UserError(f'{kind.__name__} is not a frozen dataclass; decorate it with @dataclasses.dataclass(frozen=True)')
    fields = [field.name for field in dataclasses.fields(kind)]
    names = [known.__name__.lower() for known in LETTERS.values()]
    taken = [f'axis {axis!r}' for axis in axes if axis in AXES]
    taken += [f'letter {letter!r}'] * (letter in LETTERS or letter == '.' or len(letter) != 1)
    taken += [f'name {kind.__name__!r}'] * (kind.__name__.lower() in names)
    if taken:
        raise UserError(f'{", ".join(taken)}: taken already, or not one letter; letters in use: {" ".join(LETTERS)} .')
    missing = [field for field in axes.values() if field not in fields]
    if missing:
        raise UserError(f'{kind.__name__} has no field {", ".join(missing)}; its fields: {", ".join(fields)}')
    LETTERS[letter] = kind
    AXES.update({axis: Axis(axis, kind, field) for axis, field in axes.items()})
    DECLARE[kind], APPLY[kind] = declare, apply
