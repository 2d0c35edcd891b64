"""The server as its users meet it: OpenAI's own client, over loopback, against a real server."""

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import jax
import openai
import pytest
import uvicorn

from elastic_jax.arch import MLP, Arch, Mamba
from elastic_jax.checkpoint.manifest import Budget
from elastic_jax.cli import main
from elastic_jax.cost import cost_of
from elastic_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from elastic_jax.errors import UserError, WorkError
from elastic_jax.infer.budget_control import Control, think_then_answer
from elastic_jax.infer.generate import generate
from elastic_jax.infer.resident import Resident
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.sizes import Sizes
from elastic_jax.serve import server
from elastic_jax.serve.app import make_app
from elastic_jax.serve.engine import Engine, Limits
from elastic_jax.serve.runner import Runner
from elastic_jax.serve.schema import CompletionRequest
from elastic_jax.serve.server import make_service
from tests.data.bpe import write_byte_fallback
from tests.infer.tiny import ATTENTION
from tests.tiny import numpy_params

ARCH = Arch.from_pattern(
    'M*-', vocab=264, embed=16, mamba=Mamba(heads=4, head_dim=4, groups=2, state=4, chunk=8), attention=ATTENTION, mlp=MLP(24)
)
BYTES = ByteTokenizer()
ARCHS = {'full': ARCH, 'small': ARCH.narrow(embed=12, mlp=16)}
SIZES = Sizes(Resident(jax.tree.map(jax.numpy.asarray, numpy_params(ARCH)), ARCH), ARCHS, BYTES)
BUDGETS = {name: Budget(arch, cost_of(arch).to_json(), {}) for name, arch in ARCHS.items()}
LIMITS = Limits(slots=2, queue=4, context=400, seconds=60, piece=4)
WARM = {'temperature': 1.0, 'seed': 5}


class Served:
    """A server in a thread."""

    def __init__(self, limits=LIMITS, body_bytes=4000):
        self.service = make_service(SIZES, BUDGETS, limits, body_bytes=body_bytes)
        self.socket = socket.create_server(('127.0.0.1', 0))
        self.url = f'http://127.0.0.1:{self.socket.getsockname()[1]}/v1'
        self.broken = threading.Event()
        app = make_app(self.service, self.broken.set)
        self.server = uvicorn.Server(uvicorn.Config(app, log_level='error', timeout_graceful_shutdown=2))
        self.thread = threading.Thread(target=self.server.run, kwargs={'sockets': [self.socket]})
        self.thread.start()

    def client(self, kind=openai.OpenAI):
        return kind(base_url=self.url, api_key='none', max_retries=0, timeout=60)

    def until_idle(self):
        until(lambda: self.service.runner.engine.outstanding == 0)

    def close(self):
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive() and self.service.runner.engine.closed
        assert not self.service.runner.engine._lanes, 'a server that stops makes room for no more'


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not come to it'
        time.sleep(0.02)


@pytest.fixture(scope='module')
def served():
    server = Served()
    yield server
    server.close()


@pytest.fixture
def client(served):
    return served.client()


HOT = Sampling(1.0)


def alone(prompt, budget, count, stop=(), sampling=HOT, seed=5):
    return generate(SIZES.weights(budget), BYTES, [prompt], count, sampling, stop, [seed])[0]


def test_models_are_the_budgets(client):
    assert [model.id for model in client.models.list()] == ['full', 'small']
    assert client.models.retrieve('small').parameters == BUDGETS['small'].costs['parameters']


@pytest.mark.parametrize('budget', ARCHS)
def test_a_completion_is_what_generate_writes(client, budget):
    for sampling, options in ((Sampling(), {'temperature': 0}), (Sampling(1.0), WARM)):
        done = client.completions.create(model=budget, prompt='def f(', max_tokens=20, **options)
        expected = alone('def f(', budget, 20, sampling=sampling)
        (choice,) = done.choices
        assert (choice.text, choice.finish_reason) == (expected.text, expected.finish)
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (6, len(expected.tokens))


def test_several_prompts_choices_and_our_own_fields(client):
    done = client.completions.create(
        model='full', prompt=['abc', 'de'], n=2, max_tokens=8, extra_body={'top_k': 5, 'repetition_penalty': 1.2}, **WARM
    )
    sampling = Sampling(1.0, top_k=5, repetition_penalty=1.2)
    expected = [alone(p, 'full', 8, (), sampling, 5 + i).text for i, p in enumerate(['abc', 'abc', 'de', 'de'])]
    assert [choice.text for choice in done.choices] == expected and [c.index for c in done.choices] == [0, 1, 2, 3]
    tokens = client.completions.create(model='full', prompt=list(b'abc'), max_tokens=8, **WARM)
    assert tokens.choices[0].text == alone('abc', 'full', 8).text


def test_a_stream_adds_up_to_the_whole(served, client, monkeypatch):
    # A step for each chunk that has arrived: else a busy machine's client may find them all made.
    arrived, step = threading.Semaphore(1), served.service.runner.engine.step
    monkeypatch.setattr(served.service.runner.engine, 'step', lambda: (arrived.acquire(timeout=0.2), step())[1])
    whole = alone('abc', 'full', 60)
    stop = whole.text[30:33]
    expected = alone('abc', 'full', 60, [stop])
    stream = client.completions.create(
        model='full', prompt='abc', max_tokens=60, stop=[stop], stream=True, stream_options={'include_usage': True}, **WARM
    )
    chunks = [(chunk, arrived.release())[0] for chunk in stream]
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert len(texts) > 2 and ''.join(texts) == expected.text
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == 'stop'


def test_a_chat_is_rendered_as_chatml_and_thought_about_by_another_size(client):
    messages = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'hi'}]
    prompt = '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'
    done = client.chat.completions.create(model='full', messages=messages, max_tokens=12, **WARM)
    assert done.choices[0].message.content == alone(prompt, 'full', 12).text
    own = {'think': 'small', 'thinking_tokens': 9}
    thought = client.chat.completions.create(model='full', messages=messages, max_tokens=12, extra_body=own, **WARM)
    pair = SIZES.weights('small'), SIZES.weights('full')
    (expected,), _ = think_then_answer(*pair, BYTES, [prompt], Control(9, 12), Sampling(1.0), seeds=[5])
    message = thought.choices[0].message
    assert (message.reasoning_content, message.content) == (expected.thinking, expected.answer.text)
    assert thought.usage.completion_tokens_details.reasoning_tokens == expected.thinking_tokens
    chunks = client.chat.completions.create(model='full', messages=messages, max_tokens=12, stream=True, extra_body=own, **WARM)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert ''.join(getattr(delta, 'reasoning_content', None) or '' for delta in deltas) == expected.thinking
    assert ''.join(delta.content or '' for delta in deltas) == expected.answer.text and deltas[0].role == 'assistant'


@pytest.mark.parametrize(
    'own',
    [
        {'switch': 'hand-over', 'opening': '{', 'closing': '}'},
        {'switch': 'hand-over', 'fill': 'mean', 'entropy': 5.0},
        {'entropy': 4.5, 'closing': 'ab'},
    ],
)
def test_a_request_says_how_thinking_is_limited_and_handed_on(client, own):
    body = {'think': 'small', 'answer': 'full', 'thinking_tokens': 14, **own}
    done = client.completions.create(model='small', prompt='abc', max_tokens=12, extra_body=body, **WARM)
    pair = SIZES.weights('small'), SIZES.weights('full')
    (expected,), _ = think_then_answer(*pair, BYTES, ['abc'], Control(14, 12, **own), HOT, seeds=[5])
    assert (done.choices[0].thinking, done.choices[0].text) == (expected.thinking, expected.answer.text)
    drawn = done.usage.completion_tokens_details.reasoning_tokens
    assert drawn == expected.thinking_tokens + expected.continued_tokens and done.model == 'full'


def test_a_prompt_and_what_opens_the_thoughts_are_one_text(served, tmp_path):
    """A tokenizer that begins every text with a space puts none between the two."""
    tokenizer = load_tokenizer(str(write_byte_fallback(tmp_path)))
    sizes = Sizes(SIZES.resident, ARCHS, tokenizer)
    service = dataclasses.replace(served.service, runner=Runner(Engine(sizes, LIMITS)))
    body = CompletionRequest(model='full', think='small', prompt='abc')
    (job,) = service.jobs(body, body.prompts, 4, ())
    assert list(job.tokens) == tokenizer.encode('abc<think>').tolist()


def test_concurrent_streams_each_get_their_own_text(served):
    async def one(client, index):
        parts = []
        stream = await client.completions.create(
            model=('full', 'small')[index % 2], prompt='abc'[: index % 3 + 1], max_tokens=10 + 5 * index, stream=True,
            temperature=1.0, seed=index,
        )  # fmt: skip
        async for chunk in stream:
            parts.append(chunk.choices[0].text)
        return ''.join(parts)

    async def all_of_them():
        async with served.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, index) for index in range(10)))

    found = asyncio.run(all_of_them())
    for index, text in enumerate(found):
        expected = alone('abc'[: index % 3 + 1], ('full', 'small')[index % 2], 10 + 5 * index, seed=index)
        assert text == expected.text


def lasting(count):
    """A seed with which the text is not over soon."""
    return next(seed for seed in range(50) if len(alone('abc', 'full', count, seed=seed).tokens) == count)


def test_a_client_that_hangs_up_frees_its_slots_streaming_or_not(served, client):
    options = {'model': 'full', 'prompt': 'abc', 'max_tokens': 380, 'temperature': 1.0, 'seed': lasting(380), 'n': 2}
    stream = client.completions.create(stream=True, **options)
    next(iter(stream))
    assert served.service.runner.engine.outstanding == 2
    stream.close()
    until(lambda: served.service.runner.engine.outstanding == 0, 10)
    body = json.dumps(options).encode()
    address = ('127.0.0.1', served.socket.getsockname()[1])
    with socket.create_connection(address) as raw:
        head = f'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n'
        raw.sendall(head.encode() + body)
        until(lambda: served.service.runner.engine.outstanding == 2)
    until(lambda: served.service.runner.engine.outstanding == 0, 10)
    assert client.completions.create(model='full', prompt='a', max_tokens=2).choices


def test_overload_is_shed_with_429_and_what_was_taken_on_is_served(served):
    async def one(client, index):
        try:
            done = await client.completions.create(model='full', prompt='abc', max_tokens=60, temperature=1.0, seed=index)
            return done.choices[0].text
        except openai.RateLimitError as error:
            assert error.code == 'rate_limit_exceeded' and error.response.headers['retry-after']
            return None

    async def flood():
        async with served.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, index) for index in range(40)))

    found = asyncio.run(flood())
    served_texts = {index: text for index, text in enumerate(found) if text is not None}
    assert LIMITS.slots + LIMITS.queue <= len(served_texts) < 40
    for index, text in list(served_texts.items())[:3]:
        assert text == alone('abc', 'full', 60, seed=index).text
    served.until_idle()
    assert served.client().completions.create(model='full', prompt='abc', max_tokens=2).choices


GOOD = {'model': 'full', 'prompt': 'abc', 'max_tokens': 4}


@pytest.mark.parametrize(
    ('path', 'body', 'status', 'message'),
    [
        ('completions', GOOD | {'model': 'ful'}, 404, "unknown model 'ful'; did you mean 'full'"),
        ('completions', GOOD | {'think': 'smal'}, 404, "unknown model 'smal'"),
        ('completions', GOOD | {'model': 'gpt', 'answer': 'small'}, 404, "unknown model 'gpt'"),
        ('completions', GOOD | {'think': ''}, 400, 'think: '),
        ('completions', GOOD | {'answer': ''}, 400, 'answer: '),
        ('completions', GOOD | {'think': 'small', 'thinking_tokens': 10**10}, 400, 'thinking_tokens=10000000000 must be at most'),
        ('completions', GOOD | {'think': 'small', 'thinking_tokens': 10**6}, 400, 'a request may have 400'),
        ('completions', GOOD | {'think': 'small', 'switch': 'never'}, 400, "switch: Input should be 'recompute' or 'hand-over'"),
        ('completions', GOOD | {'think': 'small', 'entropy': -1}, 400, 'entropy: '),
        ('completions', GOOD | {'think': 'small', 'closing': ''}, 400, 'closing: '),
        ('completions', GOOD | {'max_tokens': 0}, 400, 'max_tokens: '),
        ('completions', GOOD | {'max_tokens': 4000}, 400, 'a request may have 400'),
        ('completions', GOOD | {'prompt': ''}, 400, 'the prompt is empty'),
        ('completions', GOOD | {'n': 7}, 400, '7 completions are asked for at once, but there is room for 6'),
        ('completions', GOOD | {'prompt': [999]}, 400, 'token 999 is not of the vocabulary'),
        ('completions', GOOD | {'temperature': -1}, 400, 'temperature: '),
        ('completions', GOOD | {'temprature': 1}, 400, 'temprature: Extra inputs are not permitted'),
        ('completions', GOOD | {'logprobs': 3}, 400, 'logprobs: '),
        ('completions', GOOD | {'stop': ['']}, 400, 'stop: '),
        ('completions', '{"model": "full", "prompt": "a", "temperature": Infinity}', 400, 'temperature: '),
        ('completions', '{"model": "full", "prompt": "a", "repetition_penalty": Infinity}', 400, 'repetition_penalty: '),
        ('completions', 'null', 400, 'should be an object'),
        ('completions', GOOD | {'stop': ['x' * 1001]}, 400, 'each of 1 to 1000 characters'),
        ('completions', '{"model": ', 400, 'Invalid JSON'),
        ('completions', GOOD | {'prompt': 'a' * 5000}, 413, 'more than 4000 bytes'),
        ('chat/completions', {'model': 'full', 'messages': []}, 400, 'messages: '),
        ('chat/completions', {'model': 'full', 'messages': [{'role': 'tool', 'content': 'x'}]}, 400, 'messages.0.role: '),
        ('nothing', {}, 404, 'POST /v1/nothing: Not Found'),
    ],
)
def test_bad_requests_get_the_standard_error_object(served, path, body, status, message):
    data = body if isinstance(body, str) else json.dumps(body)
    request = urllib.request.Request(f'{served.url}/{path}', data.encode(), {'content-type': 'application/json'})
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request)
    error = json.loads(raised.value.read())['error']
    assert raised.value.code == status and message in error['message'] and '\n' not in error['message']
    assert set(error) == {'message', 'type', 'param', 'code'}


def test_nulls_and_what_changes_nothing_are_taken_and_an_answer_may_be_sent_back(client):
    nothing = dict.fromkeys(('n', 'stream', 'top_p', 'top_logprobs', 'logit_bias', 'seed', 'stop'))
    own = {'top_k': None, 'repetition_penalty': None, 'think': None, 'safety_identifier': 'x'}
    same = {'response_format': {'type': 'text'}, 'tool_choice': 'none', 'parallel_tool_calls': True, 'service_tier': 'auto'}
    messages = [{'role': 'user', 'content': 'hi'}]
    options = {
        'model': 'full',
        'max_tokens': 2,
        'user': 'x',
        'metadata': {},
        'store': False,
        'extra_body': own,
        **same,
        **nothing,
    }
    answer = client.chat.completions.create(messages=messages, **options).choices[0].message
    for again in (answer, answer.model_dump(), answer.model_dump() | {'annotations': [], 'tool_calls': []}):
        assert client.chat.completions.create(messages=[*messages, again, *messages], **options).choices


def test_openai_raises_its_own_errors(client):
    for field in ('model', 'think', 'answer'):
        with pytest.raises(openai.NotFoundError) as raised:
            client.completions.create(**GOOD, extra_body={field: 'gpt'})
        assert raised.value.param == field
    with pytest.raises(openai.BadRequestError):
        client.completions.create(**GOOD, extra_body={'top_k': -1})


def test_a_request_that_takes_too_long_and_a_step_that_fails_end_in_errors_and_the_next_is_served(monkeypatch):
    served = Served(Limits(slots=2, queue=2, context=400, seconds=0.001))
    try:
        with pytest.raises(openai.APIStatusError) as raised:
            served.client().completions.create(**GOOD | {'max_tokens': 300})
        assert raised.value.status_code == 408 and raised.value.response.headers['x-should-retry'] == 'false'
        with socket.create_connection(('127.0.0.1', served.socket.getsockname()[1]), timeout=30) as slow:
            slow.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{')
            assert b' 408 ' in slow.recv(1000)
    finally:
        served.close()
    served = Served()
    try:
        decode = type(served.service.runner.engine)._decode
        monkeypatch.setattr(type(served.service.runner.engine), '_decode', lambda *_: 1 / 0)
        with pytest.raises(openai.InternalServerError):
            served.client().completions.create(**GOOD)
        monkeypatch.setattr(type(served.service.runner.engine), '_decode', decode)
        expected = alone('abc', 'full', 4, sampling=Sampling()).text
        assert served.client().completions.create(**GOOD, temperature=0).choices[0].text == expected
    finally:
        served.close()


def test_an_engine_that_cannot_begin_anew_turns_everyone_away(monkeypatch):
    served = Served()
    try:
        engine = served.service.runner.engine
        # Its first step, without any request, may just be running.
        monkeypatch.setattr(engine, '_decode', lambda *_: engine.outstanding and 1 / 0)
        monkeypatch.setattr(engine, '_open_lanes', lambda: 1 / 0)
        for status in (500, 503):
            with pytest.raises(openai.InternalServerError) as raised:
                served.client().completions.create(**GOOD)
            assert raised.value.status_code == status and served.broken.wait(30)
        with pytest.raises(urllib.error.HTTPError, match='503'):
            urllib.request.urlopen(f'{served.url[:-3]}/health')
    finally:
        served.close()


def test_a_server_whose_engine_cannot_begin_anew_ends_with_one_sentence(monkeypatch):
    monkeypatch.setattr(server, 'warm', lambda engine: None)
    monkeypatch.setattr(Runner, '_steps', lambda self: 1 / 0)
    with server.listen('127.0.0.1', 0) as listening, pytest.raises(WorkError, match='could not make room anew'):
        server.serve(SIZES, BUDGETS, LIMITS, listening)


def test_what_cannot_be_listened_on_says_whether_host_or_port_is_wrong():
    with server.listen('127.0.0.1', 0) as taken:
        with pytest.raises(WorkError, match='give another --port'):
            server.listen('127.0.0.1', taken.getsockname()[1])
        with pytest.raises(UserError, match=r'--host=192\.0\.2\.1 is no address of this machine'):
            server.listen('192.0.2.1', 0)


def test_a_port_that_cannot_be_is_refused(capsys):
    with pytest.raises(SystemExit) as done:
        main(['serve', '--checkpoint', 'nowhere', '--port', '99999'])
    assert done.value.code == 2 and '--port=99999 must be from 0 to 65535' in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_a_checkpoint_and_stops_when_asked(finished_run):
    command = [sys.executable, '-m', 'elastic_jax', 'serve', '--checkpoint', finished_run, '--port', '0', '--budgets', 'small']
    process = subprocess.Popen([*command, '--context', '64'], stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if 'serving on' in line:
                break
        assert 'serving on http://127.0.0.1:' in lines[-1], lines
        url = lines[-1].split('serving on ')[1].split()[0]
        client = openai.OpenAI(base_url=url, api_key='none', max_retries=0)
        assert [model.id for model in client.models.list()] == ['small']
        assert client.completions.create(model='small', prompt='def ', max_tokens=5).usage.completion_tokens <= 5
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM, 143)
        assert 'Traceback' not in process.stderr.read()
    finally:
        process.kill()
