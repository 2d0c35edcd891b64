"""Chats are rendered as transformers does it, and exactly the assistant's words are scored."""

import json

import numpy as np
import pytest
import transformers
from ml_collections import ConfigDict

from elastic_jax.data.chat import CHATML, ChatTemplate, load_template
from elastic_jax.data.pipeline import default_data_config, load_stores, make_iterator
from elastic_jax.data.tokenizers import load_tokenizer
from elastic_jax.errors import UserError
from tests.data.bpe import write_tokenizer

CHAT = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'Größe?'},
    {'role': 'assistant', 'content': 'Zwölf.'},
    {'role': 'user', 'content': 'More?'},
    {'role': 'assistant', 'content': 'No 🙂.'},
]
TEXT = (
    '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGröße?<|im_end|>\n<|im_start|>assistant\nZwölf.<|im_end|>\n'
    '<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\nNo 🙂.<|im_end|>\n'
)
UNMARKED = CHATML.replace('{% generation %}', '').replace('{% endgeneration %}', '')
# As templates of reasoning models have it: thinking stays in the last answer alone, and the prompt opens it, with a line end
# that the answer does not have.
THINKING = (
    '{% for m in messages %}[{{ m.role }}]{% if m.role == "assistant" and loop.last %}<think>{{ m.thought }}</think>{% endif %}'
    '{{ m.content }}[end]\n{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}'
)


@pytest.mark.parametrize('template', [CHATML, UNMARKED], ids=['marked', 'unmarked'])
def test_answers_are_what_the_assistant_wrote_with_the_end_of_its_turn(template):
    text, answers = ChatTemplate(template, {}, 'test').render(CHAT)
    assert text == TEXT
    assert [text[a:b] for a, b in answers] == ['Zwölf.<|im_end|>', 'No 🙂.<|im_end|>']


@pytest.mark.parametrize('template', [CHATML, UNMARKED], ids=['marked', 'unmarked'])
def test_content_that_is_null_is_no_word(template):
    text, answers = ChatTemplate(template, {}, 'test').render([CHAT[1], {'role': 'assistant', 'content': None}])
    assert text.endswith('<|im_start|>assistant\n<|im_end|>\n') and [text[a:b] for a, b in answers] == ['<|im_end|>']


def test_an_earlier_answer_that_loses_its_thinking_is_context():
    chat = [
        {'role': 'user', 'content': 'a'},
        {'role': 'assistant', 'content': 'b', 'thought': 'hm'},
        {'role': 'user', 'content': 'c'},
        {'role': 'assistant', 'content': 'd', 'thought': 'oh'},
    ]
    template = ChatTemplate(THINKING, {}, 'test')
    text, answers = template.render(chat)
    assert text == '[user]a[end]\n[assistant]b[end]\n[user]c[end]\n[assistant]<think>oh</think>d[end]\n'
    assert [text[a:b] for a, b in answers] == ['oh</think>d[end]']
    text, answers = template.render(chat[:2])
    assert [text[a:b] for a, b in answers] == ['hm</think>b[end]']


def test_templates_are_rendered_as_transformers_renders_them(tmp_path):
    template = (
        '{{ bos_token }}{%- for m in messages %}\n    {%- if loop.first and m.role == "system" %}\n  S: {{ m.content | trim }}\n'
        '    {%- else %}\n{{ m.role | upper }}: {{ m.content | tojson }}{{ eos_token }}\n    {% endif %}\n'
        '{%- if m.role == "stop" %}{% break %}{% endif %}{%- endfor %}'
        '{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% if add_generation_prompt %}ASSISTANT: {% endif %}'
    )
    write_tokenizer(
        tmp_path, ('<end>', '<s>'), bos_token='<s>', chat_template=template, tokenizer_class='PreTrainedTokenizerFast'
    )
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ours = load_template('', load_tokenizer(str(tmp_path)))
    tools = [{'type': 'function', 'function': {'name': 'größe', 'parameters': {'type': 'object', 'properties': {}}}}]
    for given in (None, tools):
        text, answers = ours.render(CHAT, given)
        assert text == theirs.apply_chat_template(CHAT, tools=given, tokenize=False)
        assert not given or len(answers) == 0 or all('größe' not in text[a:b] for a, b in answers)


def read_chats(folder, lines, **changes):
    (folder / 'chats.jsonl').write_text('\n'.join(json.dumps(line) for line in lines))
    config = default_data_config()
    config.update({'path': str(folder / 'chats.jsonl'), 'field': 'messages', 'heldout_fraction': 0.0, **changes})
    return config


@pytest.mark.parametrize('kind', ['bytes', 'bpe'])
def test_only_answers_are_scored_in_batches(tmp_path, kind):
    specials = ('<|im_start|>', '<|im_end|>', '<end>')
    tokenizer = 'bytes' if kind == 'bytes' else str(write_tokenizer(tmp_path, specials, chat_template=CHATML))
    config = read_chats(tmp_path, [{'messages': CHAT}], loss='answers', tokenizer=tokenizer)
    encode, eos = load_tokenizer(tokenizer).encode, load_tokenizer(tokenizer).eos_id
    # By hand: the pieces between which the loss goes on and off. The end of text after the last answer is the answer's.
    pieces = [('', False)]
    pieces.append((TEXT[: TEXT.index('Zwölf')], False))
    pieces.append(('Zwölf.<|im_end|>', True))
    pieces.append((TEXT[TEXT.index('\n<|im_start|>user\nMore') : TEXT.index('No 🙂')], False))
    pieces += [('No 🙂.<|im_end|>', True), ('\n', False)]
    ids = np.concatenate([encode(text) for text, _ in pieces] + [[eos]])
    scored = np.concatenate([np.full(len(encode(text)), on) for text, on in pieces] + [[True]])
    np.testing.assert_array_equal(ids, np.append(encode(TEXT), eos))
    (store,) = load_stores(config, 'train').values()
    np.testing.assert_array_equal(store.tokens, ids)
    np.testing.assert_array_equal(store.scored, scored)
    batch = next(make_iterator(config, split='train', batch_size=1, context=len(ids), seed=0))
    np.testing.assert_array_equal(batch['targets'][0, :-1], ids[1:])
    np.testing.assert_array_equal(batch['loss_mask'][0], np.append(scored[1:], False))
    config.loss = 'all'
    batch = next(make_iterator(config, split='train', batch_size=1, context=len(ids), seed=0))
    np.testing.assert_array_equal(batch['loss_mask'][0, :-1], np.ones(len(ids) - 1))


def test_a_chat_that_ends_with_the_end_of_text_gets_no_second_one(tmp_path):
    template = CHATML.replace('<|im_end|>', '<end>')
    write_tokenizer(tmp_path, ('<|im_start|>', '<end>'), chat_template=template)
    tokenizer = load_tokenizer(str(tmp_path))
    for loss in ('all', 'answers'):
        config = read_chats(tmp_path, [{'messages': CHAT}], loss=loss, tokenizer=str(tmp_path))
        (store,) = load_stores(config, 'train').values()
        np.testing.assert_array_equal(store.tokens, tokenizer.encode(TEXT.replace('<|im_end|>', '<end>')))


def test_a_mixture_scores_each_source_its_own_way(tmp_path):
    config = read_chats(tmp_path, [{'messages': CHAT}], path='')
    chats = {'path': str(tmp_path / 'chats.jsonl'), 'loss': 'answers'}
    config.sources = ConfigDict({'chats': chats, 'code': {'heldout_fraction': 0.05}}, convert_dict=False)
    config.weights = ConfigDict({'chats': 1, 'code': 1})
    batch = next(make_iterator(config, split='train', batch_size=8, context=64, seed=0))
    np.testing.assert_array_equal(np.sort(batch['loss_mask'].mean(1) > 0.9), [False] * 4 + [True] * 4)


@pytest.mark.parametrize(
    ('line', 'changes', 'message'),
    [
        ({'messages': []}, {}, r"chats\.jsonl:1 cannot be read \(field 'messages' is list, not text or a list of messages"),
        ({'messages': [{'content': 'x'}]}, {}, 'not text or a list of messages'),
        ({'messages': CHAT[:2]}, {'loss': 'answers'}, 'has no answer to score'),
        ({'messages': 'text'}, {'loss': 'answers'}, "is text, but data.loss='answers' needs a chat"),
        ({'messages': CHAT[1:]}, {'chat_template': 'refusing.jinja'}, 'cannot be rendered as a chat .*begin with a system'),
        ({'messages': CHAT}, {'chat_template': 'broken.jinja'}, 'is not valid Jinja'),
        ({'messages': CHAT}, {'chat_template': 'none.jinja'}, r'none\.jinja cannot be read'),
        ({'messages': [{'role': 'assistant', 'content': '\x00/answer\x00'}]}, {}, 'holds the marks of answers'),
        ({'messages': CHAT}, {'chat_template': 'latin.jinja'}, r'latin\.jinja is not UTF-8'),
        ({'messages': CHAT}, {'loss': 'none'}, "unknown data.loss 'none'"),
    ],
)
def test_what_is_no_chat_is_said_with_its_line(tmp_path, line, changes, message):
    (tmp_path / 'refusing.jinja').write_text("{{ raise_exception('chats begin with a system message') }}")
    (tmp_path / 'latin.jinja').write_bytes(b'gr\xf6\xdfe')
    (tmp_path / 'broken.jinja').write_text('{% for %}')
    changes = {key: str(tmp_path / value) if value.endswith('.jinja') else value for key, value in changes.items()}
    with pytest.raises(UserError, match=message):
        load_stores(read_chats(tmp_path, [line], **changes), 'train')


def test_a_tokenizer_without_a_template_asks_for_one(tmp_path):
    config = read_chats(tmp_path, [{'messages': CHAT}], tokenizer=str(write_tokenizer(tmp_path)))
    with pytest.raises(UserError, match=r'has no chat template; give a file with one as data\.chat_template'):
        load_stores(config, 'train')
