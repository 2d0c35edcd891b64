"""Evaluators by name, of a config or a command line: held-out loss on a file, or a task, of any size.

config.evaluators.notes = {'data': 'notes.txt', 'batches': 8}
config.evaluators.chats = {'data': 'chats.jsonl', 'field': 'messages', 'loss': 'answers'}
config.evaluators.sums = {'task': 'sums.jsonl', 'limit': 100}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ml_collections import ConfigDict

from elastic_jax.data.config import PER_FILE, file_data
from elastic_jax.data.files import expand
from elastic_jax.data.pipeline import Batch, heldout_batches, load_stores
from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.errors import UserError
from elastic_jax.evaluate.tasks import Task, read_task, run_task
from elastic_jax.infer.resident import Weights


@dataclasses.dataclass(frozen=True)
class TextEvaluator:
    """Loss, perplexity and bits per byte on all of a text or JSONL file: the batches that a run scores as it does its own."""

    data: ConfigDict
    context: int = 256
    batch_size: int = 8
    batches: int | None = None

    @cached_property
    def heldout(self) -> Sequence[Batch]:
        return list(heldout_batches(self.data, self.batch_size, self.context, self.batches))


@dataclasses.dataclass(frozen=True)
class TaskEvaluator:
    """Multiple choice or exact match on a JSONL file (evaluate/tasks.py)."""

    task: Task
    limit: int | None = None

    def __call__(self, weights: Weights, tokenizer: Tokenizer) -> dict[str, float]:
        return run_task(weights, tokenizer, self.task, self.limit)


Evaluator = TextEvaluator | TaskEvaluator
COUNTS = ('context', 'batch_size', 'batches', 'limit')
TEXT_KEYS, TASK_KEYS = ('data', 'context', 'batch_size', 'batches', *PER_FILE), ('task', 'limit')


def scored_file(data: ConfigDict, path: str, changes: Mapping[str, Any]) -> ConfigDict:
    """The data config that scores all of a file as `data` has its documents, but for the keys in `changes`.

    Plain text has no answers: all of it counts, whatever the run's own chats have.
    """
    text = {'loss': 'all', 'chat_template': ''}
    is_text = changes.get('format', '') in ('', 'text') and all(file.format == 'text' for file in expand(path))
    return file_data(data, path, (text if is_text else {}) | dict(changes))


def make_evaluators(entries: Mapping[str, Mapping[str, Any]], data: ConfigDict) -> dict[str, Evaluator]:
    """The evaluators of `config.evaluators`, whose files are read as `data`, the run's own, but for what they have otherwise.

    Raises: UserError naming the entry that is wrong.
    """
    made: dict[str, Evaluator] = {}
    for name, entry in dict(entries).items():
        if not isinstance(entry, Mapping | ConfigDict):
            raise UserError(f"evaluators.{name} is {entry!r}; expected {{'data': FILE}} or {{'task': FILE}}, and its other keys")
        own = dict(entry)
        known = TASK_KEYS if 'task' in own else TEXT_KEYS
        if ('task' in own) == ('data' in own) or set(own) - set(known):
            keys = f'{", ".join(TEXT_KEYS)}; or {", ".join(TASK_KEYS)}'
            raise UserError(f'evaluators.{name} has the keys {", ".join(own) or "none"}; an evaluator has {keys}')
        for key in COUNTS:
            if own.get(key) is not None and not (isinstance(own[key], int) and own[key] >= 1):
                raise UserError(f'evaluators.{name}.{key}={own[key]!r} must be a whole number of at least 1')
        try:
            if 'task' in own:
                made[name] = TaskEvaluator(read_task(own['task']), own.get('limit'))
            else:
                changes = {key: own.pop(key) for key in PER_FILE if key in own}
                made[name] = TextEvaluator(scored_file(data, own.pop('data'), changes), **own)
        except UserError as error:
            raise UserError(f'evaluators.{name}: {error}') from error
    return made


def check_evaluators(entries: Mapping[str, Mapping[str, Any]], data: ConfigDict) -> None:
    """Reads all that the evaluators are going to score. Raises UserError naming the entry and what is wrong with it."""
    for name, evaluator in make_evaluators(entries, data).items():
        if isinstance(evaluator, TextEvaluator):
            try:
                load_stores(evaluator.data, 'heldout')
            except UserError as error:
                raise UserError(f'evaluators.{name}: {error}') from error
