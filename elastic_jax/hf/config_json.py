"""Reading a Hugging Face config.json: every value by name, of the type it must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_jax.errors import UserError

REQUIRED = object()


class Config:
    """A config.json. A missing or ill-typed value raises a UserError that names the file and the key."""

    def __init__(self, data: Mapping[str, Any], where: str = 'config.json'):
        self.data, self.where = data, where

    @classmethod
    def read(cls, folder: Path) -> Config:
        path = folder / 'config.json'
        if not path.is_file():
            raise UserError(f'{folder} has no config.json; give the folder of a Hugging Face model')
        try:
            data = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f'{path} is not JSON ({error}); fetch it again') from error
        if not isinstance(data, dict):
            raise UserError(f'{path} holds a {type(data).__name__}, not an object; fetch it again')
        return cls(data, str(path))

    def value(self, *names: str, default: Any = REQUIRED) -> Any:
        """The value of the first of `names` that is there and not null."""
        for name in names:
            if self.data.get(name) is not None:
                return self.data[name]
        if default is REQUIRED:
            raise UserError(f'{self.where} lacks {names[0]}; restore it')
        return default

    def whole(self, *names: str, default: Any = REQUIRED) -> int:
        value = self.value(*names, default=default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f'{self.where}: {names[0]}={value!r} is not a whole number')
        return value

    def number(self, *names: str, default: Any = REQUIRED) -> float:
        return self.as_number(names[0], self.value(*names, default=default))

    def as_number(self, name: str, value: Any) -> float:
        if isinstance(value, dict) and '__float__' in value:  # how transformers writes infinity
            value = float(value['__float__'])
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f'{self.where}: {name}={value!r} is not a number')
        return float(value)

    def flag(self, *names: str, default: Any = REQUIRED) -> bool:
        value = self.value(*names, default=default)
        if not isinstance(value, bool):
            raise UserError(f'{self.where}: {names[0]}={value!r} is not true or false')
        return value

    def only(self, name: str, *allowed: Any, what: str) -> None:
        """Refuses a value that is set to anything but one of `allowed`; `what` names the part that is not supported."""
        value = self.data.get(name)
        if value is not None and value not in allowed:
            expected = ' or '.join(map(repr, allowed)) or 'null'
            raise UserError(f'{self.where}: {name}={value!r}: {what} is not supported; expected {expected}')
