"""Config files and their overrides on the command line, `--config FILE[:ARG] --config.key=value`, and what is wrong with them."""

from __future__ import annotations

import difflib
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic_jax.errors import UserError


def load_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """The config of `--config FILE[:ARG]`, changed by `--config.key=value` arguments.

    Raises: UserError for a file that is not there or fails, a key that the config does not have, or a value of another kind.
    """
    if not Path(path.partition(':')[0]).is_file():
        raise UserError(f'--config {path}: there is no file {path.partition(":")[0]}; give a file with get_config')
    argv = [f'--config={path}', *overrides]
    try:
        return _parse(argv)
    except UserError:
        raise
    except Exception as error:  # the file is a program, which may fail in any way
        raise UserError(_explain(path, overrides, error)) from error


def _parse(argv: Sequence[str]) -> Any:
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    full = ['elastic', *argv]
    config_flags.DEFINE_config_file('config', None, 'file with get_config(arg)', flag_values=values, sys_argv=full)
    values(full)
    return values.config


def _explain(path: str, overrides: Sequence[str], error: BaseException) -> str:
    """What the overrides got wrong, every key and value of them in one go, or else the config file itself."""
    from elastic_jax.train.workdir import flatten

    reason = f'cannot read the config: {" ".join(str(error).split())}'
    try:
        config = _parse([f'--config={path}'])
    except Exception as own:
        return _failed(path, own) or reason
    known = flatten(json.loads(config.to_json()))
    problems = []
    for override in overrides:
        key = override.removeprefix('--config.').partition('=')[0]
        if key not in known:
            problems.append(f'unknown config key {key!r}{_nearest(key, list(known))}')
        elif not _accepted(path, override):
            problems.append(f'cannot read the value given for --config.{key}; expected one like {known[key]!r}')
    return '; '.join(problems) or reason


def _failed(path: str, error: BaseException) -> str:
    """Where in the config file something failed, and what; '' when it was not there."""
    file, found = path.partition(':')[0], error
    same = lambda name: name is not None and Path(name).resolve() == Path(file).resolve()
    while found is not None:
        lines = [frame.lineno for frame in traceback.extract_tb(found.__traceback__) if same(frame.filename)]
        if isinstance(found, SyntaxError) and same(found.filename):
            lines = [found.lineno]
        if lines:
            what = found.msg if isinstance(found, SyntaxError) else ' '.join(str(found).split())
            return f'{file}, line {lines[-1]}: {type(found).__name__}: {what}; mend the config file'
        found = found.__cause__ or found.__context__
    return ''


def _accepted(path: str, override: str) -> bool:
    try:
        _parse([f'--config={path}', override])
    except Exception:
        return False
    return True


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean {near[0]!r}?' if near else ''
