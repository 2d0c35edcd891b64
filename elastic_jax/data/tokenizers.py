"""Tokenizers: plain bytes by default, or a Hugging Face tokenizer.json."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from elastic_jax.data.chat import CHATML, Spans
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
    'generation_config.json',
)


class Tokenizer(Protocol):
    """What data, evaluation and generation need of a tokenizer.

    Attributes:
      eos_id: the end of a document. stop_ids: the tokens that end what is generated; eos_id is one of them.
    """

    spec: dict[str, Any]
    vocab_size: int
    eos_id: int
    stop_ids: tuple[int, ...]
    chat_template: str | None

    def encode(self, text: str | bytes) -> np.ndarray: ...

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]: ...

    def encode_spans(self, text: bytes, spans: Spans) -> tuple[np.ndarray, np.ndarray]: ...

    def decode(self, ids: Iterable[int], special: bool = False) -> str: ...

    def byte_lengths(self) -> np.ndarray: ...

    def special_tokens(self) -> dict[str, str]: ...

    def identity(self) -> str: ...


class ByteTokenizer:
    """One token per byte, and 256 for the end of a document."""

    spec = {'kind': 'bytes'}  # noqa: RUF012 - never written to.
    vocab_size = 257
    eos_id = 256
    stop_ids = (256,)
    chat_template = CHATML

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids [n], int32."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Token ids of several texts."""
        return [self.encode(text) for text in texts]

    def encode_spans(self, text: bytes, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, whether each lies in one of the spans of characters), [n] each."""
        ids, inside, decoded = self.encode(text), np.zeros(len(text), np.bool_), text.decode()
        for begin, end in spans:
            first = len(decoded[:begin].encode())
            inside[first : first + len(decoded[begin:end].encode())] = True
        return ids, inside

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text; bytes that are no UTF-8 are replaced, and ids that are no byte left out, or with `special` shown as <end>."""
        end = b'<end>' if special else b''
        return b''.join(bytes((i,)) if i < 256 else end for i in map(int, ids)).decode(errors='replace')

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each token stands for, [vocab_size]."""
        return np.asarray([1] * 256 + [0], np.int32)

    def special_tokens(self) -> dict[str, str]:
        """Texts of the tokens that chat templates name; bytes have none."""
        return {}

    def identity(self) -> str:
        """What tells this tokenizer from others."""
        return 'bytes'


class HFTokenizer:
    """A Hugging Face tokenizer, from a folder with tokenizer.json.

    tokenizer_config.json names the end of text; generation_config.json may name other tokens that end an answer, such as the end
    of a turn, and a model's config.json as well (`also_stop`).
    """

    def __init__(self, folder: str, also_stop: Iterable[int] = ()):
        import tokenizers

        path = Path(folder) / 'tokenizer.json'
        if not path.is_file():
            raise UserError(f'{folder} has no tokenizer.json; give the folder of a Hugging Face tokenizer, or "bytes"')
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f'{path} cannot be read as a tokenizer: {error}') from error
        self.spec = {'kind': 'hf', 'folder': str(folder)}
        # Not how many there are: ids may have gaps, and an array by id must hold the last of them.
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.config = _read_json(Path(folder) / 'tokenizer_config.json')
        self.eos_id = self._special('eos_token')
        generation = _read_json(Path(folder) / 'generation_config.json')
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, *token_ids(generation.get('eos_token_id')), *also_stop]))
        self.chat_template = _chat_template(Path(folder), self.config)
        self._bytes = self._fallback()
        self._hidden = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}

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

    def encode_many(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Token ids of several texts, on all cores."""
        found = self.tokenizer.encode_batch_fast([text.decode(errors='replace') for text in texts], add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in found]

    def encode_spans(self, text: bytes, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, whether each begins in one of the spans of characters), [n] each."""
        encoding = self.tokenizer.encode(text.decode(), add_special_tokens=False)
        begins = np.asarray([begin for begin, _ in encoding.offsets], np.int64)
        inside = np.zeros(len(begins), np.bool_)
        for begin, end in spans:
            inside |= (begins >= begin) & (begins < end)
        return np.asarray(encoding.ids, np.int32), inside

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text, with or without the special tokens."""
        ids = [int(i) for i in ids]
        if self._bytes.keys().isdisjoint(ids):
            return self.tokenizer.decode(ids, skip_special_tokens=not special)
        # The library makes a whole run of byte tokens unreadable for one character of it that is not complete: a text that grows
        # would take back what it has shown. So the runs are read here.
        hidden = () if special else self._hidden
        shown = [i for i in ids if i not in hidden and self.tokenizer.id_to_token(i) is not None]
        tokens: list[str] = []
        for is_bytes, run in itertools.groupby(shown, self._bytes.__contains__):
            if is_bytes:
                tokens.append(bytes(self._bytes[i] for i in run).decode(errors='replace'))
            else:
                tokens.extend(map(self.tokenizer.id_to_token, run))
        return self.tokenizer.decoder.decode(tokens)

    def _fallback(self) -> dict[int, int]:
        """The tokens that stand for a byte of a character without a token of its own; none where bytes are read otherwise."""
        found = {self.tokenizer.token_to_id(f'<0x{byte:02X}>'): byte for byte in range(256)}
        found.pop(None, None)
        return found if found and 'ByteFallback' in self._decoders() else {}

    def _decoders(self) -> set[str | None]:
        """The kinds of step by which tokens become text."""
        decoder = json.loads(self.tokenizer.to_str()).get('decoder') or {}
        return {decoder.get('type')} | {part.get('type') for part in decoder.get('decoders', [])}

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each token stands for, [vocab_size]; special tokens stand for none."""
        kinds, added = self._decoders(), self.tokenizer.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items():
            if i in self._hidden:
                continue
            if i in added:
                lengths[i] = len(token.encode())  # stands for itself, whatever the others are written in
            elif 'ByteLevel' in kinds:
                lengths[i] = len(token)  # one printable character per byte
            elif token.startswith('<0x') and len(token) == 6:
                lengths[i] = 1  # byte fallback
            else:
                lengths[i] = len(token.replace('\u2581', ' ').encode())
        return lengths

    def special_tokens(self) -> dict[str, str]:
        """Texts of the tokens that chat templates name, such as bos_token."""
        found = {}
        for name, token in self.config.items():
            text = token.get('content') if isinstance(token, dict) else token
            if name.endswith('_token') and isinstance(text, str):
                found[name] = text
        return found

    def identity(self) -> str:
        """What tells this tokenizer from others, wherever its folder lies."""
        content = json.dumps([self.tokenizer.to_str(), self.eos_id, self.chat_template, self.special_tokens()])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The tokenizer's chat template: a file of its own, or in tokenizer_config.json (of several, the one named default)."""
    own = folder / 'chat_template.jinja'
    if own.is_file():
        return own.read_text()
    found = config.get('chat_template')
    if isinstance(found, list):
        found = {entry.get('name'): entry.get('template') for entry in found if isinstance(entry, dict)}.get('default')
    return found if isinstance(found, str) else None


def token_ids(entry: Any) -> list[int]:
    """The ids of an entry such as `eos_token_id`, which may be one, several, or null."""
    return [entry] if isinstance(entry, int) else list(entry or ())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise UserError(f'{path} is not JSON: {error}') from error


def load_tokenizer(spec: str | dict[str, Any], also_stop: Iterable[int] = ()) -> Tokenizer:
    """The tokenizer of a spec: 'bytes', a folder with tokenizer.json (`also_stop` of it), or the `spec` of another tokenizer."""
    if isinstance(spec, dict):
        spec = 'bytes' if spec.get('kind') == 'bytes' else str(spec.get('folder', ''))
    return ByteTokenizer() if spec == 'bytes' else HFTokenizer(spec, also_stop)
