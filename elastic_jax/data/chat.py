"""Chats as text: a tokenizer's Jinja template renders the messages, and says which characters the assistant wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from elastic_jax.errors import UserError

BEGIN, END = '\x00answer\x00', '\x00/answer\x00'

# For the byte tokenizer, which has no template of its own.
CHATML = (
    '{% for message in messages %}<|im_start|>{{ message.role }}\n'
    '{% if message.role == "assistant" %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}'
    '{% else %}{{ message.content }}<|im_end|>{% endif %}{{ "\n" }}{% endfor %}'
    '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)

Spans = tuple[tuple[int, int], ...]


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, by which templates mark what the assistant writes."""

    tags = {'generation'}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        return nodes.CallBlock(self.call_method('_mark'), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f'{BEGIN}{caller()}{END}'


class ChatTemplate:
    """Renders chats. The date that some templates ask for is not given, as the same chat must always give the same text."""

    def __init__(self, text: str, special_tokens: Mapping[str, str], where: str):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=False,
            extensions=[_Generation, 'jinja2.ext.loopcontrols'],
            finalize=lambda value: '' if value is None else value,  # content may be null, and the word None is in no chat
        )
        environment.filters['tojson'] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals['raise_exception'] = _raise
        try:
            self._template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise UserError(f'the chat template of {where} is not valid Jinja: {error}') from error
        self.text = text
        self._special, self._marked = dict(special_tokens), 'endgeneration' in text

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> tuple[str, Spans]:
        """(text, the spans of characters that the assistant wrote, each with the token that ends its turn).

        Templates that mark answers by `generation` say so themselves. Otherwise an answer is what the text has beyond the prompt
        rendered up to it, and an earlier answer that the template writes differently once more follows (its thinking taken out)
        is context, not an answer: the model would not have written it so.

        Raises: ValueError when the template refuses the messages.
        """
        text = self._render(messages, tools, False)
        if self._marked:
            return _split_marks(text)
        spans = []
        for i, message in enumerate(messages):
            if message.get('role') != 'assistant':
                continue
            before = self._render(messages[:i], tools, False) if i else ''
            begin = _shared(self._render(messages[:i], tools, True), text)
            upto = self._render(messages[: i + 1], tools, False)
            if begin >= len(before) and text.startswith(upto):
                spans.append((begin, len(upto.rstrip())))
        return text, tuple(spans)

    def prompt(self, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
        """The text that the assistant's next answer continues. Raises: ValueError when the template refuses the messages."""
        text = self._render(messages, tools, True)
        return _split_marks(text)[0] if self._marked else text

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool) -> str:
        try:
            return self._template.render(messages=messages, tools=tools, add_generation_prompt=prompt, **self._special)
        except (jinja2.TemplateError, KeyError, AttributeError) as error:
            raise ValueError(f'the chat template refuses it: {error}') from error


def _shared(a: str, b: str) -> int:
    """Characters that both begin with."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _split_marks(text: str) -> tuple[str, Spans]:
    plain, spans, place = [], [], 0
    for i, part in enumerate(text.split(BEGIN)):
        answer, mark, rest = part.partition(END)
        if bool(mark) != (i > 0) or END in rest:
            raise ValueError('its text holds the marks of answers')
        if i:
            spans.append((place, place + len(answer)))
        plain.append(answer + rest)
        place += len(plain[-1])
    return ''.join(plain), tuple(spans)


def is_chat(value: Any) -> bool:
    """Whether a field's value is a list of messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and isinstance(m.get('role'), str) for m in value)


def load_template(path: str, tokenizer: Any) -> ChatTemplate | None:
    """The template in a file, else the tokenizer's own; None when there is neither. Raises UserError for one that is damaged."""
    if path:
        try:
            text = Path(path).read_text('utf-8')
        except OSError as error:
            raise UserError(f'data.chat_template: {path} cannot be read ({error.strerror or error})') from error
        except UnicodeDecodeError as error:
            raise UserError(f'data.chat_template: {path} is not UTF-8 ({error}); give a file of text with a template') from error
        return ChatTemplate(text, tokenizer.special_tokens(), path)
    if tokenizer.chat_template is None:
        return None
    return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens(), 'the tokenizer')
