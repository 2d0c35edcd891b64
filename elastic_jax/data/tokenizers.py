"""Tokenizers: plain bytes by default, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from elastic_jax.errors import UserError

# What a Hugging Face tokenizer's folder may hold that reading text, rendering chats and exporting need.
TOKENIZER_FILES = (
    'tokenizer.json',
    'tokenizer_config.json',
    'special_tokens_map.json',
    'added_tokens.json',
    'vocab.json',
    'merges.txt',
    'tokenizer.model',
    'chat_template.jinja',
)


class Tokenizer(Protocol):
    """What data, evaluation and generation need of a tokenizer."""

    spec: dict[str, Any]
    vocab_size: int
    eos_id: int

    def encode(self, text: str | bytes) -> np.ndarray: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def byte_lengths(self) -> np.ndarray: ...


class ByteTokenizer:
    """One token per byte, and 256 for the end of a document."""

    spec = {'kind': 'bytes'}  # noqa: RUF012 - never written to.
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids [n], int32."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text; ids that are no byte are left out, bytes that are no UTF-8 are replaced."""
        return bytes(i for i in map(int, ids) if i < 256).decode(errors='replace')

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each token stands for, [vocab_size]."""
        return np.asarray([1] * 256 + [0], np.int32)


class HFTokenizer:
    """A Hugging Face tokenizer, from a folder with tokenizer.json (and tokenizer_config.json, which names the end of text)."""

    def __init__(self, folder: str):
        import tokenizers

        path = Path(folder) / 'tokenizer.json'
        if not path.is_file():
            raise UserError(f'{folder} has no tokenizer.json; give the folder of a Hugging Face tokenizer, or "bytes"')
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f'{path} cannot be read as a tokenizer: {error}') from error
        self.spec = {'kind': 'hf', 'folder': str(folder)}
        self.vocab_size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        self.config = _read_json(Path(folder) / 'tokenizer_config.json')
        self.eos_id = self._special('eos_token')

    def _special(self, name: str) -> int:
        token = self.config.get(name)
        token = token.get('content') if isinstance(token, dict) else token
        known = [token] if token else ['</s>', '<|endoftext|>', '<|end_of_text|>', '<eos>', '<|im_end|>']
        for candidate in known:
            found = self.tokenizer.token_to_id(candidate)
            if found is not None:
                return found
        raise UserError(
            f'the tokenizer in {self.spec["folder"]} names no end-of-text token; set eos_token in tokenizer_config.json'
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids [n], int32, without special tokens."""
        text = text.decode(errors='replace') if isinstance(text, bytes) else text
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each token stands for, [vocab_size]; special tokens stand for none."""
        decoder = json.loads(self.tokenizer.to_str()).get('decoder') or {}
        kinds = {decoder.get('type')} | {part.get('type') for part in decoder.get('decoders', [])}
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items():
            if i in special:
                continue
            if 'ByteLevel' in kinds:
                lengths[i] = len(token)  # one printable character per byte
            elif token.startswith('<0x') and len(token) == 6:
                lengths[i] = 1  # byte fallback
            else:
                lengths[i] = len(token.replace('\u2581', ' ').encode())
        return lengths


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f'{path} is not JSON: {error}') from error


def load_tokenizer(spec: str | dict[str, Any]) -> Tokenizer:
    """The tokenizer of a spec: 'bytes', a folder with tokenizer.json, or the `spec` of another tokenizer."""
    if isinstance(spec, dict):
        spec = 'bytes' if spec.get('kind') == 'bytes' else str(spec.get('folder', ''))
    return ByteTokenizer() if spec == 'bytes' else HFTokenizer(spec)
