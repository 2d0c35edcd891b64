"""Arrays that are built once: in memory, or in files of a cache folder that later runs map into memory.

A cache entry is a folder named by a hash of all that its content depends on. `complete.json` is written last, so an entry
without it (or with files of other sizes than it says) was cut off and is built again. A lock, which the system lets go when its
holder dies, makes other processes of the machine wait for the one that builds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from elastic_jax.data.config import SourceConfig
from elastic_jax.data.files import expand
from elastic_jax.data.tokenizers import Tokenizer
from elastic_jax.errors import UserError, WorkError

FORMAT = 2
MARKER = 'complete.json'


class ArrayFiles:
    """Named one-dimensional arrays of some splits, written by appending and read when finished.

    Attributes, once finished:
      arrays: split -> name -> array. fingerprints: split -> hash of its arrays. facts: JSON of the builder.
    """

    def __init__(self, splits: Sequence[str], dtypes: dict[str, np.dtype], folder: Path | None):
        self.dtypes, self.folder = dtypes, folder
        self.keys = [(split, name) for split in splits for name in dtypes]
        self.arrays: dict[str, dict[str, np.ndarray]] = {}
        self.fingerprints: dict[str, str] = {}
        self.facts: dict[str, Any] = {}

    @classmethod
    def in_memory(cls, splits: Sequence[str], dtypes: dict[str, np.dtype]) -> ArrayFiles:
        files = cls(splits, dtypes, None)
        files._begin(lambda key: bytearray())
        return files

    def _begin(self, new: Callable[[tuple[str, str]], Any]) -> None:
        self._sinks = {key: new(key) for key in self.keys}
        self._hashes = {key: hashlib.blake2b(digest_size=16) for key in self.keys}

    def append(self, split: str, name: str, values: np.ndarray) -> None:
        raw = memoryview(np.ascontiguousarray(values, self.dtypes[name])).cast('B') if len(values) else b''
        sink = self._sinks[split, name]
        if isinstance(sink, bytearray):
            sink += raw
        else:
            sink.write(raw)
        self._hashes[split, name].update(raw)

    def _path(self, key: tuple[str, str]) -> Path:
        return self.folder / f'{key[0]}.{key[1]}.bin'

    def _fingerprint(self) -> None:
        for split, _ in self.keys:
            own = b''.join(name.encode() + self._hashes[split, name].digest() for name in self.dtypes)
            self.fingerprints[split] = hashlib.blake2b(own, digest_size=8).hexdigest()

    def finish(self, facts: dict[str, Any]) -> None:
        """Ends writing and opens the arrays for reading."""
        self.facts = facts
        self._fingerprint()
        for (split, name), sink in self._sinks.items():
            self.arrays.setdefault(split, {})[name] = np.frombuffer(sink, self.dtypes[name])

    def build_on_disk(self, build: Callable[[ArrayFiles], dict[str, Any]]) -> None:
        """Writes the files by `build`, which returns the facts; the marker comes last, when all else is on the disk."""
        self._begin(lambda key: open(self._path(key), 'wb'))  # noqa: SIM115 - closed below
        try:
            facts = build(self)
            sizes = {}
            for key, sink in self._sinks.items():
                sink.flush()
                os.fsync(sink.fileno())
                sizes[self._path(key).name] = sink.tell()
        finally:
            for sink in self._sinks.values():
                sink.close()
        self._fingerprint()
        marker = {'sizes': sizes, 'fingerprints': self.fingerprints, 'facts': facts}
        with open(self.folder / MARKER, 'w') as file:
            json.dump(marker, file)
            file.flush()
            os.fsync(file.fileno())

    def open_complete(self) -> bool:
        """Maps a finished entry into memory; False when it is not there or was cut off."""
        try:
            marker = json.loads((self.folder / MARKER).read_text())
            if any((self.folder / name).stat().st_size != size for name, size in marker['sizes'].items()):
                return False
        except (OSError, ValueError):
            return False
        self.fingerprints, self.facts = marker['fingerprints'], marker['facts']
        for split, name in self.keys:
            path, dtype = self._path((split, name)), self.dtypes[name]
            empty = path.stat().st_size == 0
            array = np.empty(0, dtype) if empty else np.asarray(np.memmap(path, dtype, mode='r'))
            self.arrays.setdefault(split, {})[name] = array
        return True


def cached(
    root: str,
    key: str,
    splits: Sequence[str],
    dtypes: dict[str, np.dtype],
    build: Callable[[ArrayFiles], dict[str, Any]],
) -> ArrayFiles:
    """The arrays of an entry, built when they are not there. Raises UserError when the folder cannot be used."""
    if '://' in root:
        raise UserError(f'data.cache={root} must be a folder of this machine, since its files are mapped into memory')
    folder = Path(root).expanduser() / key
    files = ArrayFiles(splits, dtypes, folder)
    if files.open_complete():
        return files
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix('.lock')):
            if not files.open_complete():  # another process may have built it meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                files.build_on_disk(build)
                if not files.open_complete():
                    raise WorkError(f'data.cache: {folder} changed while it was written; is another program using the folder?')
    except OSError as error:
        raise UserError(
            f'data.cache: {folder} cannot be written ({error.strerror or error}); make room, or give another folder'
        ) from error
    return files


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stamps(source: SourceConfig) -> list[Any]:
    """What changes when a file of the source does. Raises UserError when there is none."""
    return [file.stamp() for file in expand(source.path)] if source.path else [sys.version]


def source_key(source: SourceConfig, tokenizer: Tokenizer, template: str) -> str:
    """Hash of all that a source's tokens depend on: settings, tokenizer, chat template, and every file's name, size and time."""
    settings = {name: value for name, value in dataclasses.asdict(source).items() if name not in ('name', 'cache')}
    content = json.dumps([FORMAT, settings, tokenizer.identity(), template, stamps(source)], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
