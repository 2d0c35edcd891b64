"""Evaluators by name, of a config or a command line: held-out loss on a file, or a task, of any size.

config.evaluators.notes = {'data': 'notes.txt', 'batches': 8}
config.evaluators.sums = {'task': 'sums.jsonl', 'limit': 100}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from ml_collections import ConfigDict

from elastic_jax.data.pipeline import Batch, default_data_config, heldout_batches
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
TEXT_KEYS, TASK_KEYS = ('data', 'context', 'batch_size', 'batches'), ('task', 'limit')


def make_evaluators(entries: Mapping[str, Mapping[str, Any]], tokenizer: str = 'bytes') -> dict[str, Evaluator]:
    """The evaluators of `config.evaluators`; `tokenizer` as in config.data. Raises UserError naming the entry that is wrong."""
    made: dict[str, Evaluator] = {}
    for name, entry in dict(entries).items():
        own = dict(entry)
        known = TASK_KEYS if 'task' in own else TEXT_KEYS
        if ('task' in own) == ('data' in own) or set(own) - set(known):
            keys = f'{", ".join(TEXT_KEYS)}; or {", ".join(TASK_KEYS)}'
            raise UserError(f'evaluators.{name} has the keys {", ".join(own) or "none"}; an evaluator has {keys}')
        if 'task' in own:
            made[name] = TaskEvaluator(read_task(own['task']), own.get('limit'))
        else:
            data = default_data_config()
            data.update({'path': own.pop('data'), 'heldout_fraction': 1.0, 'tokenizer': tokenizer})
            made[name] = TextEvaluator(data, **own)
    return made
