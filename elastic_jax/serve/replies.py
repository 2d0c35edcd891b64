"""What clients get: OpenAI's objects, whole and in chunks."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from elastic_jax.serve.engine import Progress


@dataclasses.dataclass(frozen=True)
class Reply:
    """The frame of one request's answer."""

    chat: bool
    model: str
    prompt_tokens: int
    id: str = ''
    created: int = 0

    @classmethod
    def begin(cls, chat: bool, model: str, prompt_tokens: int) -> Reply:
        kind = 'chatcmpl' if chat else 'cmpl'
        return cls(chat, model, prompt_tokens, f'{kind}-{uuid.uuid4().hex}', int(time.time()))

    def whole(self, found: Sequence[Progress]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        return {**self._frame(False), 'choices': [self._choice(i, p) for i, p in enumerate(found)], 'usage': self.usage(found)}

    def _choice(self, index: int, progress: Progress) -> dict[str, Any]:
        finish = {'index': index, 'finish_reason': progress.finish, 'logprobs': None}
        if not self.chat:
            thinking = {'thinking': progress.thinking} if progress.thinking_tokens else {}
            return {'text': progress.text, **thinking, **finish}
        message = {'role': 'assistant', 'content': progress.text, 'refusal': None}
        if progress.thinking_tokens:
            message['reasoning_content'] = progress.thinking
        return {'message': message, **finish}

    def chunk(self, index: int, before: Progress | None, now: Progress) -> dict[str, Any]:
        """What one choice has gained since `before` (None: nothing was sent of it yet)."""
        sent = before or Progress()
        text, thinking = now.text[len(sent.text) :], now.thinking[len(sent.thinking) :]
        delta: dict[str, Any] = {'role': 'assistant'} if self.chat and before is None else {}
        if text or not self.chat:
            delta['content' if self.chat else 'text'] = text
        if thinking:
            delta['reasoning_content' if self.chat else 'thinking'] = thinking
        own = {'delta': delta} if self.chat else delta
        choice = {'index': index, **own, 'finish_reason': now.finish or None, 'logprobs': None}
        return {**self._frame(True), 'choices': [choice]}

    def last(self, found: Sequence[Progress]) -> dict[str, Any]:
        """The chunk that has the usage."""
        return {**self._frame(True), 'choices': [], 'usage': self.usage(found)}

    def usage(self, found: Sequence[Progress]) -> dict[str, Any]:
        """Tokens of all choices; those of the thoughts are part of the completion's."""
        thoughts = sum(progress.thinking_tokens for progress in found)
        completion = thoughts + sum(progress.tokens for progress in found)
        return {
            'prompt_tokens': self.prompt_tokens,
            'completion_tokens': completion,
            'total_tokens': self.prompt_tokens + completion,
            'completion_tokens_details': {'reasoning_tokens': thoughts},
        }

    def _frame(self, chunk: bool) -> dict[str, Any]:
        kind = ('chat.completion.chunk' if chunk else 'chat.completion') if self.chat else 'text_completion'
        return {'id': self.id, 'object': kind, 'created': self.created, 'model': self.model}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b'data: ' + json.dumps(data, ensure_ascii=False).encode() + b'\n\n'


DONE = b'data: [DONE]\n\n'


def error_object(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {'error': {'message': message, 'type': kind, 'param': param, 'code': code}}
