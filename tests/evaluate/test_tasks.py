"""Tasks, likelihoods and evaluators: against log-probabilities summed from plain logits, and answers known beforehand."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import elastic_jax
from elastic_jax.cli import main
from elastic_jax.data.config import default_data_config
from elastic_jax.errors import UserError
from elastic_jax.evaluate.evaluators import check_evaluators, make_evaluators
from elastic_jax.evaluate.likelihood import likelihoods
from elastic_jax.evaluate.tasks import read_task, run_task
from elastic_jax.hf.importing import import_checkpoint
from elastic_jax.infer.sampling import Sampling

FIXTURE = Path(__file__).parents[1] / 'hf' / 'fixtures' / 'qwen3'

QUESTIONS = [
    {'context': 'def read(', 'choices': ['self)', 'x', 'import os'], 'answer': 1},
    {'context': 'import ', 'choices': ['os', 'zzzzzz'], 'answer': 0},
    {'context': '', 'choices': ['a', 'bcd', 'ef'], 'answer': 2},
]


@pytest.fixture(scope='module')
def model(finished_run):
    return elastic_jax.open_checkpoint(finished_run).load('small')


def plain_log_p(model, context, continuation):
    """Byte by byte from whole logits, in float64."""
    first = list(context.encode()) or [model.tokenizer.eos_id]
    tokens = [*first, *continuation.encode()]
    logits = np.asarray(model.logits(np.asarray([tokens])), np.float64)[0]
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    places = range(len(first) - 1, len(tokens) - 1)
    return sum(log_p[n, tokens[n + 1]] for n in places), all(log_p[n].argmax() == tokens[n + 1] for n in places)


def write(path, lines):
    path.write_text('\n'.join(map(json.dumps, lines)))
    return path


def test_likelihoods_are_sums_of_plain_log_probabilities_in_any_order(model):
    pairs = [(question['context'], choice) for question in QUESTIONS for choice in question['choices']]
    likeliest = {letter: int(np.argmax(np.asarray(model.logits([[letter]]))[0, -1])) for letter in range(32, 127)}
    letter, best = next((letter, best) for letter, best in likeliest.items() if best < 128)
    pairs.append((chr(letter), chr(best)))
    for pair, found in zip(pairs, likelihoods(model.weights, model.tokenizer, pairs), strict=True):
        expected, greedy = plain_log_p(model, *pair)
        assert found.log_p == pytest.approx(expected, rel=1e-4, abs=1e-4), pair
        assert found.greedy == greedy and found.bytes == len(pair[1].encode())
    assert found.greedy


def test_multiple_choice_counts_the_likeliest_and_the_likeliest_per_byte(model, tmp_path):
    scores = run_task(model.weights, model.tokenizer, read_task(write(tmp_path / 'task.jsonl', QUESTIONS)))
    right = per_byte = 0
    for question in QUESTIONS:
        log_p = [plain_log_p(model, question['context'], choice)[0] for choice in question['choices']]
        right += int(np.argmax(log_p)) == question['answer']
        per_byte += (
            int(np.argmax([own / len(c) for own, c in zip(log_p, question['choices'], strict=True)])) == question['answer']
        )
    assert scores == {
        'accuracy': right / 3,
        'accuracy_per_byte': per_byte / 3,
        'chance': pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3),
        'questions': 3,
    }


def test_exact_match_counts_the_texts_that_are_an_answer(finished_run, model, tmp_path, capsys):
    written = model.generate('import ', max_tokens=64, stop=['\n']).strip()
    lines = [{'prompt': 'import ', 'answer': answer} for answer in (written, [written + 'x', written], written + 'x', 'no')]
    path = write(tmp_path / 'exact.jsonl', lines)
    assert run_task(model.weights, model.tokenizer, read_task(path)) == {'exact_match': 0.5, 'questions': 4}
    notes = tmp_path / 'notes.txt'
    notes.write_text('import os\n' * 40)
    argv = ['eval', '--checkpoint', finished_run, '--budgets', 'small', '--widths', 'embed=8', '--widths', 'mlp@3=16,embed=12']
    argv += ['--data', notes, '--tasks', path, '--limit', '2', '--json']
    with pytest.raises(SystemExit) as done:
        main(list(map(str, argv)))
    assert done.value.code == 0
    small, by_width, other = json.loads(capsys.readouterr().out)['budgets']
    assert small['name'] == 'small' and small['tasks'] == {'exact': {'exact_match': 1.0, 'questions': 2}}
    assert by_width['name'].startswith('embed=8') and 'mlp@3=16' in other['name']
    checkpoint = elastic_jax.open_checkpoint(finished_run)
    alone = checkpoint.load(widths={'embed': 8}).evaluate(checkpoint.heldout(str(notes), batches=32))
    assert by_width['bits_per_byte'] == pytest.approx(alone['bits_per_byte'], rel=1e-5)


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        ('{"context": "a", "choices": ["b"], "answer": 1}', r'line 2 is no question .*not the index of one of 1 choices'),
        ('{"context": "a"}', r"line 2 is no question \(KeyError\('prompt'\)|line 2 is no question \(KeyError\('answer'\)"),
        ('{"prompt": "a", "answer": "b"', 'line 2 is no question'),
        ('{"prompt": "a", "answer": [5]}', 'line 2 is no question .*answers and stop strings are texts'),
        ('{"prompt": "a", "answer": "b", "stop": [""]}', 'line 2 is no question .*no stop string is empty'),
        ('{"context": "a", "choices": "bc", "answer": 1}', "line 2 is no question .*'bc' are not a list"),
        ('{"prompt": "a", "answer": "b"}', 'both kinds of question'),
    ],
)
def test_what_is_no_question_is_said_with_file_and_line(tmp_path, line, message):
    path = tmp_path / 'task.jsonl'
    path.write_text(json.dumps(QUESTIONS[0]) + '\n' + line)
    with pytest.raises(UserError, match=message):
        read_task(path)


def test_one_stop_string_is_not_its_letters(tmp_path):
    path = write(tmp_path / 'task.jsonl', [{'prompt': 'a', 'answer': 'b', 'stop': stop} for stop in ('END', ['END'])])
    assert [question.stop for question in read_task(path).questions] == [('END',), ('END',)]


def test_two_tasks_of_one_name_are_refused(tmp_path):
    """Scores stand by name: one of the two would be lost."""
    import_checkpoint(FIXTURE, tmp_path / 'run')
    paths = [tmp_path / folder / 'sums.jsonl' for folder in 'ab']
    for path in paths:
        path.parent.mkdir()
        write(path, QUESTIONS)
    with pytest.raises(UserError, match='two tasks are named sums'):
        elastic_jax.open_checkpoint(tmp_path / 'run').evaluate(data=str(paths[0]), tasks=list(map(str, paths)))


def test_an_evaluator_that_is_not_one_is_said_by_name(tmp_path):
    missing, chats = tmp_path / 'none', tmp_path / 'chats.jsonl'
    write(chats, [{'messages': [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'yo'}]}])
    own = default_data_config()
    for entry, message in (
        ({'tsak': 'x.jsonl'}, r'evaluators\.sums has the keys tsak; an evaluator has data'),
        ('notes.txt', r"evaluators\.sums is 'notes\.txt'; expected \{'data': FILE\}"),
        ({'task': f'{missing}.jsonl'}, r'evaluators\.sums: the task .* cannot be read'),
        ({'data': f'{missing}.txt'}, r'evaluators\.sums: data\.path: .* cannot be read'),
        ({'task': str(chats), 'limit': 0}, r'evaluators\.sums\.limit=0 must be a whole number of at least 1'),
        ({'data': str(chats)}, r"evaluators\.sums: .*chats\.jsonl:1 has no field 'text'"),
    ):
        with pytest.raises(UserError, match=message):
            check_evaluators({'sums': entry}, own)
    # As the run has it, or as the entry says.
    own.update({'field': 'messages', 'loss': 'answers'})
    as_run, said = (
        make_evaluators({'chats': {'data': str(chats), **changes}}, own)['chats'].heldout[0]['target_bytes'].sum()
        for changes in ({}, {'loss': 'all'})
    )
    assert said > as_run > 0
    (tmp_path / 'notes.txt').write_text('plain')
    check_evaluators({'notes': {'data': str(tmp_path / 'notes.txt')}}, own)


def test_questions_end_at_line_breaks_alone_and_may_follow_a_byte_order_mark(tmp_path):
    questions = [{'prompt': f'a{character}b', 'answer': '5'} for character in '\u2028\x85\u2029']
    path = tmp_path / 'task.jsonl'
    path.write_text('\r\n'.join(json.dumps(question, ensure_ascii=False) for question in questions), 'utf-8-sig', newline='')
    task = read_task(path)
    assert [question.prompt for question in task.questions] == [question['prompt'] for question in questions]
    with pytest.raises(UserError, match='limit=0 questions of the task task: give at least 1'):
        run_task(None, None, task, 0)


def test_the_harness_draws_a_request_anew_where_it_is_repeated(monkeypatch):
    made = {name: types.ModuleType(name) for name in ('lm_eval', 'lm_eval.api', 'lm_eval.api.model', 'lm_eval.api.registry')}
    made['lm_eval.api.model'].LM, made['lm_eval.api.registry'].register_model = object, lambda name: lambda own: own
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, 'elastic_jax.evaluate.harness', raising=False)
    from elastic_jax.evaluate import harness

    calls, answer = [], types.SimpleNamespace(text='x')
    monkeypatch.setattr(harness, 'generate', lambda *given, seeds: calls.append((given[4], seeds)) or [answer])
    lm = object.__new__(harness.ElasticLM)
    lm.model = types.SimpleNamespace(weights=None, tokenizer=None)
    sampled, greedy = {'do_sample': True, 'temperature': 0.8, 'top_p': 0.5, 'top_k': 7}, {'temperature': 0.8}
    lm.generate_until([types.SimpleNamespace(args=('Q:', own)) for own in (sampled, sampled, greedy)])
    assert calls == [(Sampling(0.8, 7, 0.5), 0), (Sampling(0.8, 7, 0.5), 1), (Sampling(), 2)]
    monkeypatch.delitem(sys.modules, 'elastic_jax.evaluate.harness')


HARNESS_TASK = """\
task: own
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
target_delimiter: ""
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.slow
def test_the_harness_runs_its_tasks_on_a_budget_with_local_data(finished_run, model, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    import lm_eval
    from lm_eval.tasks import TaskManager

    from elastic_jax.evaluate.harness import ElasticLM

    data = write(tmp_path / 'task.jsonl', QUESTIONS[:2] * 3)
    (tmp_path / 'own.yaml').write_text(HARNESS_TASK.format(data=data))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(ElasticLM(str(finished_run), budget='small'), tasks=['own'], task_manager=tasks)
    log_p = [[plain_log_p(model, question['context'], choice)[0] for choice in question['choices']] for question in QUESTIONS[:2]]
    right = [int(np.argmax(own)) == question['answer'] for own, question in zip(log_p, QUESTIONS, strict=False)]
    assert found['results']['own']['acc,none'] == pytest.approx(np.mean(right))
    assert found['results']['own']['sample_len'] == 6
