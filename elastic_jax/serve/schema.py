"""What clients may send: the fields of OpenAI's completions and chat completions that have a meaning here, and our own.

Fields that would change the answer and are not supported are refused rather than ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from elastic_jax.errors import UserError
from elastic_jax.infer.budget_control import Control
from elastic_jax.infer.sampling import Sampling

MAX_CHOICES = 16
MAX_STOP = 1000
Zero = Annotated[float, Field(ge=0, le=0)]
Nothing = Annotated[list[Any], Field(max_length=0)]


class Body(BaseModel):
    """Fields that are null are as if left out: clients send them for what nobody asked for. Other unknown ones are refused."""

    model_config = ConfigDict(extra='forbid', allow_inf_nan=False)

    @model_validator(mode='before')
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class StreamOptions(Body):
    """How a stream ends: perhaps with a chunk that has the usage and no choices."""

    model_config = ConfigDict(extra='ignore')
    include_usage: bool = False


class ResponseFormat(Body):
    """The form of an answer; only text."""

    type: Literal['text']


class Common(Body):
    """Fields of both kinds of request. `think`, `answer` and how thinking is limited and handed on are ours."""

    model: str
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: str | list[str] = []
    seed: int | None = None
    presence_penalty: Zero = 0
    frequency_penalty: Zero = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = {}
    # Of no consequence here, and sent by many clients.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # Ours.
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0)
    think: str | None = Field(None, min_length=1)
    answer: str | None = Field(None, min_length=1)
    thinking_tokens: int = Field(256, ge=1)
    opening: str = '<think>'
    closing: str = Field('</think>', min_length=1)
    switch: Literal['recompute', 'hand-over'] = 'recompute'
    fill: Literal['zero', 'mean'] = 'zero'
    entropy: float | None = Field(None, ge=0)

    @field_validator('stop')
    @classmethod
    def _stops(cls, stop: str | list[str]) -> list[str]:
        found = [stop] if isinstance(stop, str) else stop
        if len(found) > 4 or not all(1 <= len(string) <= MAX_STOP for string in found):
            raise ValueError(f'give at most 4 strings, each of 1 to {MAX_STOP} characters')
        return found

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)

    @property
    def answers(self) -> str:
        """The size that answers."""
        return self.model if self.answer is None else self.answer

    def control(self, max_tokens: int) -> Control | None:
        """How thinking is limited; None when nobody thinks."""
        if self.think is None:
            return None
        own = (self.opening, self.closing, self.switch, self.fill, self.entropy)
        return Control(self.thinking_tokens, max_tokens, *own)


class CompletionRequest(Common):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int = Field(16, ge=1)
    best_of: Literal[1] = 1
    echo: Literal[False] = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """One entry for each prompt, text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        if not self.prompt:
            raise UserError('prompt is an empty list; give at least one prompt')
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise UserError(f'{len(self.prompt)} prompts of n={self.n} are more than {MAX_CHOICES} choices; send fewer')
        return self.prompt


class Part(Body):
    """A piece of a message's content; only text."""

    type: Literal['text']
    text: str


class Message(Body):
    """One message of a chat; an answer may be sent back as it came."""

    role: Literal['system', 'developer', 'user', 'assistant']
    content: str | list[Part]
    name: str | None = None
    reasoning_content: str | None = None
    annotations: Nothing = []
    tool_calls: Nothing = []

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it."""
        content = self.content if isinstance(self.content, str) else ''.join(part.text for part in self.content)
        return {'role': 'system' if self.role == 'developer' else self.role, 'content': content}


class ChatRequest(Common):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] = False
    response_format: ResponseFormat | None = None
    tools: Nothing = []
    # Without tools there is nothing to choose.
    tool_choice: Literal['none', 'auto'] = 'none'
    parallel_tool_calls: bool = True

    def limit(self, default: int) -> int:
        return self.max_completion_tokens or self.max_tokens or default
