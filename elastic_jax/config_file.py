"""Config files and their overrides on the command line, `--config FILE[:ARG] --config.key=value`, and what is wrong with them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_jax.errors import UserError


def load_config(argv: Sequence[str], verb: str = 'train') -> tuple[Any, str]:
    """(config, workdir) from the arguments of `elastic train`; of another verb, which takes no workdir, that is ''.

    Raises: UserError for a file that is not there, a key that the config does not have, or a value of another kind.
    """
    from absl import flags

    argv = list(argv)
    path = next((arg.partition('=')[2] or _after(argv, arg) for arg in argv if arg.partition('=')[0] == '--config'), None)
    if not path:
        raise UserError(f'{verb} needs --config FILE, such as experiments/quickstart.py')
    if not Path(path.partition(':')[0]).is_file():
        raise UserError(f'--config {path}: there is no file {path.partition(":")[0]}; give a file with get_config')
    try:
        values, rest = _parse(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_explain(argv, path, error)) from error
    if len(rest) > 1:
        raise UserError(f'unknown argument {rest[1]!r}; {verb} takes --config, --config.key=value and --workdir')
    if verb == 'train' and not values.workdir:
        raise UserError('train needs --workdir DIR, where config, metrics, checkpoints and report go')
    return values.config, values.workdir or ''


def _parse(argv: list[str]) -> tuple[Any, list[str]]:
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    full = ['elastic', *argv]
    config_flags.DEFINE_config_file('config', None, 'file with get_config(arg)', flag_values=values, sys_argv=full)
    flags.DEFINE_string('workdir', None, 'where everything goes', flag_values=values)
    return values, values(full)


def _after(argv: list[str], flag: str) -> str | None:
    place = argv.index(flag) + 1
    return argv[place] if place < len(argv) else None


def _explain(argv: list[str], path: str, error: BaseException) -> str:
    """The sentence for what the command line did not understand: the first wrong flag, or the config file itself."""
    from absl import flags

    from elastic_jax.train.workdir import flatten

    reason = f'cannot read the config: {" ".join(str(error).split())}'
    try:
        values, _ = _parse([f'--config={path}'])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError):
        return reason
    known = flatten(json.loads(values.config.to_json()))
    for arg in argv:
        name = arg.lstrip('-').partition('=')[0]
        if arg.startswith('--') and name not in ('config', 'workdir') and not name.startswith('config.'):
            return f'unknown flag --{name}{_nearest(name, ["config", "workdir"], "--")}'
        key = name.removeprefix('config.')
        if arg.startswith('--config.') and key not in known:
            return f'unknown config key {key!r}{_nearest(key, list(known))}'
    wrong = next((arg for arg in argv if arg.startswith('--config.') and not _accepted(path, arg)), None)
    if wrong is None:
        return reason
    name = wrong.lstrip('-').partition('=')[0]
    return f'cannot read the value given for --{name}; expected one like {known[name.removeprefix("config.")]!r}'


def _accepted(path: str, override: str) -> bool:
    from absl import flags

    try:
        _parse([f'--config={path}', override])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def _nearest(name: str, known: list[str], prefix: str = '') -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean {prefix + near[0] if prefix else repr(near[0])}?' if near else ''
