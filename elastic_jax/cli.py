"""The `elastic` command: its verbs (`verbs/`, one thin function each), exit status and errors.

Exit status 0; 1 when the work failed; 2 for bad usage or input. Errors are one sentence on stderr; results go to stdout.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any

from elastic_jax.arch import unknown_name
from elastic_jax.checkpoint.quiet import quiet_failures
from elastic_jax.errors import UserError, WorkError
from elastic_jax.verbs import cache_teacher, data, eval, generate, import_, inspect, pareto, plan, report, serve, slice, train

# In the order in which they are used.
VERBS = {
    'data': data,
    'train': train,
    'inspect': inspect,
    'eval': eval,
    'generate': generate,
    'serve': serve,
    'pareto': pareto,
    'slice': slice,
    'report': report,
    'import': import_,
    'plan': plan,
    'cache-teacher': cache_teacher,
}

PATH_THROUGH = """\
elastic: one parent language model in, one checkpoint of nested models out.

The usual path:
  what it will train on: samples, counts, speed
    elastic data --config experiments/quickstart.py
  a parent, ranked, searched, trained elastically; ten minutes on two cores
    elastic train --config experiments/quickstart.py --workdir runs/quickstart
  what is inside: sizes, costs, nested widths
    elastic inspect --checkpoint runs/quickstart
  how good every budget is
    elastic eval --checkpoint runs/quickstart
  text from any size
    elastic generate --checkpoint runs/quickstart --budget small --prompt 'def '
  every size over HTTP, as OpenAI serves models
    elastic serve --checkpoint runs/quickstart
  the best sizes between the budgets, against any cost
    elastic pareto --checkpoint runs/quickstart --out runs/quickstart/pareto
  one size as a checkpoint of its own
    elastic slice --checkpoint runs/quickstart --budget small --out out/small
  report.html and pareto.png
    elastic report --workdir runs/quickstart

With a parent and chips of your own:
  a Hugging Face model, a folder or an id, as the parent
    elastic import --hf DIR_OR_ID --checkpoint runs/parent
  its logits, kept for the training of all budgets
    elastic cache-teacher --config experiments/elastic_from_hf.py:runs/parent \\
      --config.teacher_cache.path=runs/teacher
  what it takes on TPUs, without one
    elastic plan --config experiments/quickstart.py --topology v5e:2x2

`elastic VERB --help` says more about each.
"""


class _Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors that name the nearest flag."""

    def error(self, message: str) -> Any:
        raise UserError(f'{message} (see {self.prog} --help)')

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        # Before argparse, which would rather complain of what is missing than of what is misspelt.
        known = {flag: action for action in _all_actions(self, argv) for flag in action.option_strings}
        waiting = iter(argv)
        for argument in waiting:
            flag, equals, _ = argument.partition('=')
            if argument == '--':
                break
            if flag.startswith('--') and flag not in known:
                near = difflib.get_close_matches(flag, known, n=1)
                hint = f'; did you mean {near[0]}?' if near else ''
                self.error(f'unknown flag {flag}{hint}')
            if flag in known and known[flag].nargs != 0 and not equals:
                next(waiting, None)  # its value, which may begin with dashes as well
        return self.parse_args(argv)


def _all_actions(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[argparse.Action]:
    verbs = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return verbs.choices[argv[0]]._actions if argv and argv[0] in verbs.choices else parser._actions


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `elastic` command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    quiet_failures()
    try:
        status = run(argv)
    except UserError as error:
        status = _fail(error, 2)
    except WorkError as error:
        status = _fail(error, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = _fail('interrupted', 130)
    sys.stdout.flush()
    sys.exit(status)


def _fail(error: object, status: int) -> int:
    print(f'elastic: {error}', file=sys.stderr)
    return status


def run(argv: list[str]) -> int:
    """Runs one command and returns its exit status."""
    if not argv:
        print(PATH_THROUGH, end='')
        return 0
    arguments = parse(argv)
    return arguments.run(arguments)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command, with `run` to run it. Raises UserError for a verb or flag that there is not."""
    if not argv[0].startswith('-') and argv[0] not in VERBS:
        raise UserError(unknown_name('verb', argv[0], list(VERBS)))
    rest, overrides = _split_overrides(argv)
    arguments = _parser().parse_strictly(rest)
    if overrides and not getattr(arguments, 'takes_overrides', False):
        raise UserError(f'{overrides[0]!r}: {arguments.verb} takes no config')
    arguments.overrides = overrides
    return arguments


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--config.key=value` and `--config.key value` out: argparse cannot know the keys."""
    rest: list[str] = []
    overrides: list[str] = []
    waiting = list(reversed(argv))
    while waiting:
        argument = waiting.pop()
        if not argument.startswith('--config.'):
            rest.append(argument)
            continue
        if '=' not in argument and waiting and not waiting[-1].startswith('--'):
            argument = f'{argument}={waiting.pop()}'
        overrides.append(argument)
    return rest, overrides


def _parser() -> _Parser:
    parser = _Parser(prog='elastic', description=PATH_THROUGH, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest='verb', metavar='VERB', required=True, parser_class=_Parser)
    for name, verb in VERBS.items():
        own = subparsers.add_parser(
            name,
            help=verb.SUMMARY,
            description=verb.SUMMARY,
            epilog=f'example:\n  {verb.EXAMPLE}',
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.arguments(own)
        own.set_defaults(run=verb.run)
    return parser
