"""A teacher's top-k log-probabilities for the rows of a stream, on disk: each process writes its rows, any process reads any.

A cache is a folder of whole files named by batch and row, which are never appended to or renamed, so it may lie in an object
store. `index.json` says what they hold; `complete.json` comes last. Every file ends with a checksum.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from elastic_jax.errors import UserError

FORMAT = 1
FILE_BYTES = 2**25
CHECKSUM = 4


@dataclasses.dataclass(frozen=True)
class TeacherSpec:
    """What a cache is of.

    Attributes:
      stream: identity of the batches (`data.pipeline.Batches.identity`): text, order, context, batch size.
      parent: hash of the teacher's parameters. vocab: its tokens.
      k: how many tokens are kept; tail: whether the mass of the others is. context: tokens in a row. dtype: of the matmuls.
    """

    stream: Mapping[str, Any]
    parent: str
    vocab: int
    k: int
    tail: bool
    context: int
    dtype: str

    @property
    def name(self) -> str:
        """The name of the folder: a hash of all that the content depends on."""
        described = json.dumps([FORMAT, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.blake2b(described.encode(), digest_size=8).hexdigest()

    @property
    def id_dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.vocab <= 2**16 else np.int32)

    @property
    def columns(self) -> int:
        return self.k + self.tail

    @property
    def bytes_per_token(self) -> int:
        return self.k * self.id_dtype.itemsize + 2 * self.columns

    def bytes_of(self, batches: int, rows: int) -> int:
        return batches * rows * self.context * self.bytes_per_token + CHECKSUM


class TeacherCache:
    """The cache of one stream under `root`.

    Args:
      batches: how many batches it holds or is to hold. ranges: which rows of a batch each writing process has.
    """

    def __init__(self, root: epath.PathLike, spec: TeacherSpec, batches: int, ranges: Sequence[Sequence[int]]):
        self.folder, self.spec, self.batches = epath.Path(root) / spec.name, spec, batches
        self.ranges = tuple((int(first), int(last)) for first, last in ranges)
        widest = max(last - first for first, last in self.ranges)
        self.per_file = max(1, min(batches, FILE_BYTES // spec.bytes_of(1, widest)))
        self._load = functools.lru_cache(maxsize=4 * len(self.ranges))(self._read)

    @classmethod
    def open(cls, root: epath.PathLike, spec: TeacherSpec, batches: int) -> TeacherCache:
        """A finished cache of at least so many batches. Raises UserError when there is none."""
        folder = epath.Path(root) / spec.name
        again = 'run elastic cache-teacher with this config'
        if not (folder / 'index.json').exists():
            raise UserError(f'{root} has no teacher cached for this text, order, parent and k (no folder {spec.name}); {again}')
        if not (folder / 'complete.json').exists():
            raise UserError(f'the teacher cache {folder} is not finished; {again}, and it goes on')
        try:
            index = json.loads((folder / 'index.json').read_text())
            found = cls(root, spec, index['batches'], index['ranges'])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f'{folder}/index.json is damaged ({error!r}); remove {folder} and {again}') from error
        if found.batches < batches:
            raise UserError(f'the teacher cache {folder} holds {found.batches} batches, but {batches} are needed; {again}')
        return found

    @property
    def groups(self) -> int:
        """How many files each range of rows takes."""
        return -(-self.batches // self.per_file)

    def batches_of(self, group: int) -> range:
        return range(group * self.per_file, min((group + 1) * self.per_file, self.batches))

    def begin(self) -> None:
        """Says what is going to be written; by one process.

        The cache may be there for fewer batches or be cut off: it is not complete from here on. Its files are kept where they
        hold the same rows and batches. Otherwise they go: one of other rows may be just as long, and would be taken for its own.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / 'complete.json').unlink(missing_ok=True)
        if not self._continues():
            for path in self.folder.glob('*.bin'):
                path.unlink()
        index = {'batches': self.batches, 'ranges': self.ranges, **dataclasses.asdict(self.spec)}
        (self.folder / 'index.json').write_text(json.dumps(index, indent=1))

    def _continues(self) -> bool:
        """Whether what is in the folder was written in files of the same rows and batches."""
        try:
            index = json.loads((self.folder / 'index.json').read_text())
            before = TeacherCache(self.folder.parent, self.spec, index['batches'], index['ranges'])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return (before.ranges, before.per_file) == (self.ranges, self.per_file)

    def finish(self) -> None:
        """Declares the cache complete; by one process, when all have written."""
        (self.folder / 'complete.json').write_text(json.dumps({'format': FORMAT, 'batches': self.batches}))

    def _path(self, group: int, first: int) -> epath.Path:
        return self.folder / f'{group:06d}-{first:06d}.bin'

    def has(self, group: int, first: int, last: int) -> bool:
        """Whether a file is there in its full length: one cut off by a kill is written again."""
        path = self._path(group, first)
        return path.exists() and path.stat().length == self.spec.bytes_of(len(self.batches_of(group)), last - first)

    def write(self, group: int, first: int, ids: np.ndarray, log_p: np.ndarray) -> None:
        """The rows from `first` of a group's batches: ids [M, R, T, K], log-probabilities [M, R, T, K + 1] with the tail last."""
        kept = log_p[..., : self.spec.columns].astype(np.float16)
        raw = np.ascontiguousarray(ids, self.spec.id_dtype).tobytes() + np.ascontiguousarray(kept).tobytes()
        self._path(group, first).write_bytes(raw + zlib.crc32(raw).to_bytes(CHECKSUM, 'little'))

    def _read(self, group: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        path, spec = self._path(group, first), self.spec
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(
                f'{path} cannot be read ({error}); remove {self.folder} and run elastic cache-teacher again'
            ) from error
        body = memoryview(raw)[:-CHECKSUM]
        if zlib.crc32(body) != int.from_bytes(raw[-CHECKSUM:], 'little'):
            raise UserError(f'{path} is damaged; remove {self.folder} and run elastic cache-teacher again')
        shape = (len(self.batches_of(group)), last - first, spec.context)
        cut = int(np.prod(shape)) * spec.k * spec.id_dtype.itemsize
        ids = np.frombuffer(body[:cut], spec.id_dtype).reshape(*shape, spec.k)
        return ids, np.frombuffer(body[cut:], np.float16).reshape(*shape, spec.columns)

    def rows(self, batch: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """{'teacher_ids': [R, T, K] int32, 'teacher_log_p': [R, T, K + 1] float16} of some rows, ascending, of one batch."""
        group, within = divmod(batch, self.per_file)
        ids, log_p = [], []
        for first, last in self.ranges:
            own = rows[(rows >= first) & (rows < last)] - first
            if len(own):
                stored_ids, stored_log_p = self._load(group, first, last)
                ids.append(stored_ids[within, own])
                log_p.append(stored_log_p[within, own])
        log_p = np.concatenate(log_p)
        if not self.spec.tail:
            log_p = np.concatenate([log_p, np.full_like(log_p[..., :1], -np.inf)], axis=-1)
        return {'teacher_ids': np.concatenate(ids).astype(np.int32), 'teacher_log_p': log_p}
