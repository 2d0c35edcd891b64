"""Tasks with right and wrong answers, from JSONL files; each line is one of

{"context": "2 + 3 =", "choices": [" 5", " 6"], "answer": 0}    multiple choice: the likeliest continuation is its answer
{"prompt": "2 + 3 =", "answer": "5", "stop": ["\\n"]}            exact match: what it writes; or one of a list of answers
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.errors import UserError
from elastic_jax.evaluate.likelihood import likelihoods
from elastic_jax.infer.generate import generate
from elastic_jax.infer.resident import Weights

MAX_TOKENS = 64
PROMPTS = 8  # answered together


@dataclasses.dataclass(frozen=True)
class Choice:
    context: str
    choices: tuple[str, ...]
    answer: int


@dataclasses.dataclass(frozen=True)
class Exact:
    prompt: str
    answers: tuple[str, ...]
    stop: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A file of questions, all of one kind."""

    name: str
    questions: tuple[Choice, ...] | tuple[Exact, ...]


def read_task(path: epath.PathLike) -> Task:
    """Reads a task. Raises UserError naming the file and line that is not a question."""
    path = epath.Path(path)
    try:
        # Not splitlines: within its strings JSON may hold other characters that end lines.
        lines = path.read_bytes().decode('utf-8-sig').split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'the task {path} cannot be read ({error}); give a JSONL file') from error
    questions = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                questions.append(_question(json.loads(line)))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise UserError(f'{path}, line {number} is no question ({error!r}); {_SHAPES}') from error
    if not questions or len({type(question) for question in questions}) > 1:
        raise UserError(f'{path} has {"both kinds of question" if questions else "no question"}; {_SHAPES}')
    return Task(Path(path.name).stem, tuple(questions))


_SHAPES = 'give lines of {"context", "choices", "answer": index}, or of {"prompt", "answer"}'


def _question(given: dict) -> Choice | Exact:
    if 'choices' in given:
        if not isinstance(given['choices'], list):
            raise ValueError(f'choices {given["choices"]!r} are not a list')
        choices = tuple(given['choices'])
        if not isinstance(given['answer'], int) or not 0 <= given['answer'] < len(choices):
            raise ValueError(f'answer {given["answer"]!r} is not the index of one of {len(choices)} choices')
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError('every choice is a text of at least one character')
        return Choice(str(given['context']), choices, given['answer'])
    answers = (given['answer'],) if isinstance(given['answer'], str) else tuple(given['answer'])
    if not given['prompt'] or not answers:
        raise ValueError('prompt and answer must not be empty')
    stop = given.get('stop', ('\n',))
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(text, str) for text in (given['prompt'], *answers, *stop)) or '' in stop:
        raise ValueError('prompt, answers and stop strings are texts, and no stop string is empty')
    return Exact(given['prompt'], answers, stop)


def run_task(weights: Weights, tokenizer: Tokenizer, task: Task, limit: int | None = None) -> dict[str, float]:
    """Scores of a size on the first `limit` questions, or all.

    Multiple choice: `accuracy` by Σ log p of the choices, `accuracy_per_byte` by that over the choice's bytes (so that length
    does not count), and the `chance` of guessing. Exact match: `exact_match` of the text without spaces around it.
    """
    if limit is not None and limit < 1:
        raise UserError(f'limit={limit} questions of the task {task.name}: give at least 1, or None for all')
    questions = task.questions[:limit]
    if isinstance(questions[0], Choice):
        return _choose(weights, tokenizer, questions)
    right = 0
    for stop in sorted({question.stop for question in questions}):
        own = [question for question in questions if question.stop == stop]
        for start in range(0, len(own), PROMPTS):
            batch = own[start : start + PROMPTS]
            done = generate(weights, tokenizer, [question.prompt for question in batch], MAX_TOKENS, stop=stop)
            right += sum(
                text.text.strip() in [answer.strip() for answer in question.answers]
                for text, question in zip(done, batch, strict=True)
            )
    return {'exact_match': right / len(questions), 'questions': len(questions)}


def _choose(weights: Weights, tokenizer: Tokenizer, questions: Sequence[Choice]) -> dict[str, float]:
    pairs = [(question.context, choice) for question in questions for choice in question.choices]
    found = iter(likelihoods(weights, tokenizer, pairs))
    plain, per_byte = 0, 0
    for question in questions:
        own = [next(found) for _ in question.choices]
        best = lambda score, own=own: max(range(len(own)), key=lambda n: score(own[n]))
        plain += best(lambda one: one.log_p) == question.answer
        per_byte += best(lambda one: one.log_p / one.bytes) == question.answer
    count = len(questions)
    chance = sum(1 / len(question.choices) for question in questions) / count
    return {'accuracy': plain / count, 'accuracy_per_byte': per_byte / count, 'chance': chance, 'questions': count}
