"""The keys of `config.data`, and the sources they describe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from elastic_jax.errors import UserError

PACKINGS = ('concat', 'whole')
LOSSES = ('all', 'answers')
FORMATS = ('', 'text', 'jsonl', 'parquet', 'arrayrecord')


def default_data_config() -> ConfigDict:
    """The keys of `config.data`. A stage may set some of them otherwise for itself (`stage(..., data={...})`)."""
    return ConfigDict(
        {
            # Where the documents are: a file, a folder, or a glob pattern, here or at any URL that fsspec opens (gs://, s3://,
            # hf://), perhaps compressed (.gz, .xz, .bz2); empty: the standard library's source.
            'path': '',
            'format': '',  # text, jsonl, parquet or arrayrecord; empty: by the file's suffix
            # Of a JSONL line, Parquet row or ArrayRecord object: text, or a chat (a list of messages). '': ArrayRecords of text.
            'field': 'text',
            'encoding': 'utf-8',  # of text and JSONL without a byte order mark; 'bytes' takes text as it is
            'chat_template': '',  # a file with a Jinja template; empty: the tokenizer's own (ChatML for bytes)
            'loss': 'all',  # what the loss counts: all tokens, or only a chat's 'answers'
            # Several sources instead: name -> any of the keys above, heldout_fraction and max_bad_lines; the rest as given here.
            'sources': ConfigDict(convert_dict=False),
            # Name of source -> its share of the rows, in any unit (70 and 30); a source not named is left out. Empty: by tokens.
            'weights': ConfigDict(convert_dict=False),
            # 'concat' stands documents end to end and cuts rows out; 'whole' fills rows with whole documents and pads the rest.
            'packing': 'concat',
            'tokenizer': 'bytes',  # or a folder with tokenizer.json
            'heldout_fraction': 0.05,  # of the documents, chosen by their content; of a single text, its end
            'max_bad_lines': 0,  # damaged lines (of each source) that are passed over; one more is an error
            # A folder of this machine that keeps the tokens, mapped into memory: for more than memory holds, and to read once.
            'cache': '',
        }
    )


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of documents, resolved: keys as in `default_data_config`; `name` is '' when it is the only one."""

    name: str
    path: str
    format: str
    field: str
    encoding: str
    chat_template: str
    loss: str
    tokenizer: str
    heldout_fraction: float
    max_bad_lines: int
    cache: str


# What may be said of one file that is scored.
PER_FILE = ('format', 'field', 'encoding', 'chat_template', 'loss', 'max_bad_lines')
PER_SOURCE = ('path', 'format', 'field', 'encoding', 'chat_template', 'loss', 'heldout_fraction', 'max_bad_lines')


def complete(config: ConfigDict | Mapping[str, Any]) -> ConfigDict:
    """A data config with defaults for the keys it lacks (it may be of an older run). Raises UserError for unknown ones."""
    given = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    whole = default_data_config()
    _check_keys(given, list(whole), 'key of config.data')
    for key, value in given.items():
        whole[key] = ConfigDict(dict(value), convert_dict=False) if key in ('sources', 'weights') else value
    return whole


def stage_data(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """`config.data` as one stage has it: `changes` replace keys. Raises UserError for an unknown key, or another tokenizer."""
    changes = changes.to_dict() if isinstance(changes, ConfigDict) else dict(changes)
    if changes.get('tokenizer', config.tokenizer) != config.tokenizer:
        raise UserError('a stage cannot change data.tokenizer: the parent has one vocabulary; set it in config.data')
    return complete(complete(config).to_dict() | changes)


def file_data(config: ConfigDict | Mapping[str, Any], path: str, changes: Mapping[str, Any]) -> ConfigDict:
    """`config.data` turned to all of one file, held out; `changes` replace keys of PER_FILE."""
    whole = {'path': path, 'format': '', 'sources': {}, 'weights': {}, 'heldout_fraction': 1.0, 'cache': ''}
    return complete(complete(config).to_dict() | whole | dict(changes))


def sources_of(config: ConfigDict) -> tuple[tuple[SourceConfig, float | None], ...]:
    """The sources of a data config with their weights; a weight of None stands for its number of tokens.

    Raises: UserError naming the key that is wrong.
    """
    config = complete(config)
    if config.packing not in PACKINGS:
        raise UserError(_unknown('data.packing', config.packing, PACKINGS))
    shared = {key: config[key] for key in (*PER_SOURCE, 'tokenizer', 'cache')}
    named = {name: dict(value) for name, value in dict(config.sources).items()}
    weights = dict(config.weights)
    if not named:
        if weights:
            raise UserError('data.weights needs data.sources, whose shares it gives')
        return ((_source('', shared), None),)
    if config.path:
        raise UserError(f'data.path={config.path} and data.sources are both given; name that path as one of the sources')
    _check_keys(weights, list(named), 'source in data.weights')
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f'data.weights.{name}={weight!r} must be a number of at least 0')
    if weights and not any(weights.values()):
        raise UserError('data.weights are all 0; give at least one source a share')
    result = []
    for name, own in named.items():
        _check_keys(own, list(PER_SOURCE), f'key of data.sources.{name}')
        source = _source(name, shared | own)
        if not weights:
            result.append((source, None))
        elif weights.get(name):
            result.append((source, float(weights[name])))
    return tuple(result)


def _source(name: str, values: dict[str, Any]) -> SourceConfig:
    where = f'data.sources.{name}' if name else 'data'
    for key, known in (('loss', LOSSES), ('format', FORMATS)):
        if values[key] not in known:
            raise UserError(_unknown(f'{where}.{key}', values[key], known))
    if not 0 <= values['heldout_fraction'] <= 1:
        raise UserError(f'{where}.heldout_fraction={values["heldout_fraction"]} must be between 0 and 1')
    return SourceConfig(name=name, **values)


def _check_keys(given: Mapping[str, Any], known: list[str], what: str) -> None:
    for key in given:
        if key not in known:
            raise UserError(_unknown(what, key, known))


def _unknown(what: str, found: Any, known: Any) -> str:
    return f'unknown {what} {found!r}; known: {", ".join(map(repr, known))}'
