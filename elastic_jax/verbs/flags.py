"""Flags that several verbs have."""

from __future__ import annotations

import argparse


def checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--checkpoint', required=True, metavar='DIR', help='a workdir, or one step of it')


def config(parser: argparse.ArgumentParser) -> None:
    """The config file. `--config.key=value` flags are taken out before argparse sees them, into `arguments.overrides`."""
    help_ = 'file with get_config(arg); --config.key=value overrides'
    parser.add_argument('--config', required=True, metavar='FILE[:ARG]', help=help_)
    parser.set_defaults(takes_overrides=True)


def json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of a table')
