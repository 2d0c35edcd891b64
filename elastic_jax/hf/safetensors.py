"""The safetensors format, read and written a few rows at a time: 8 bytes of header length, a JSON header, then the tensors.

No torch and no pickle: bfloat16 and the 8-bit floats are ml_dtypes. Reading takes only the rows that are asked for, so a
process never holds more than it uses.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from elastic_jax.errors import UserError, WorkError

DTYPES: dict[str, np.dtype] = {
    'F64': np.dtype(np.float64),
    'F32': np.dtype(np.float32),
    'F16': np.dtype(np.float16),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
    'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
    'I64': np.dtype(np.int64),
    'I32': np.dtype(np.int32),
    'I16': np.dtype(np.int16),
    'I8': np.dtype(np.int8),
    'U8': np.dtype(np.uint8),
    'BOOL': np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the format's own limit


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `begin` is its offset in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_size(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file, open for reading. Raises UserError when it is truncated or no safetensors file."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            self.file = self.path.open('rb', buffering=0)
        except OSError as error:
            raise UserError(f'{self.path} cannot be read ({error.strerror}); give a readable safetensors file') from error
        size = os.fstat(self.file.fileno()).st_size
        length = int.from_bytes(self.file.read(8), 'little')
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
            raise UserError(f'{self.path} is no safetensors file, or its header is cut off ({size} bytes); fetch it again')
        try:
            header = json.loads(self.file.read(length))
            self.metadata = header.pop('__metadata__', {})
            self.tensors = {name: self._info(name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{self.path} has a damaged header ({error}); fetch it again') from error
        needed = max((info.begin + info.bytes for info in self.tensors.values()), default=8 + length)
        if size < needed:
            raise UserError(f'{self.path} is truncated: it has {size} bytes, its header promises {needed}; fetch it again')

    @staticmethod
    def _info(name: str, entry: dict[str, Any], data: int) -> TensorInfo:
        if entry['dtype'] not in DTYPES:
            raise ValueError(f'{name} has unknown dtype {entry["dtype"]}')
        begin, end = entry['data_offsets']
        info = TensorInfo(DTYPES[entry['dtype']], tuple(entry['shape']), data + begin)
        if end - begin != info.bytes:
            raise ValueError(f'{name} spans {end - begin} bytes, its shape {info.shape} needs {info.bytes}')
        return info

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of a tensor, as a new array; all of it by default."""
        info = self.tensors[name]
        stop = info.rows if stop is None else stop
        row_bytes = info.row_size * info.dtype.itemsize
        buffer = np.empty((stop - start) * row_bytes, np.uint8)
        view, offset = memoryview(buffer), info.begin + start * row_bytes
        while len(view):  # one call reads 2 GiB at most
            count = os.preadv(self.file.fileno(), [view[: 1 << 30]], offset)
            if not count:
                raise UserError(f'{self.path} ends inside {name}; fetch it again')
            view, offset = view[count:], offset + count
        return buffer.view(info.dtype).reshape((stop - start, *info.shape[1:]) if info.shape else ())

    def close(self) -> None:
        self.file.close()


class SafetensorsWriter:
    """Writes a file whose tensors are known beforehand and arrive in order, any number of rows at a time."""

    def __init__(self, path: str | os.PathLike[str], tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]]):
        self.path, header, offset = Path(path), {}, 0
        for name, dtype, shape in tensors:
            size = math.prod(shape) * dtype.itemsize
            header[name] = {'dtype': NAMES[dtype], 'shape': list(shape), 'data_offsets': [offset, offset + size]}
            offset += size
        text = json.dumps({'__metadata__': {'format': 'pt'}, **header}, separators=(',', ':')).encode()
        text += b' ' * (-len(text) % 8)  # tensors start aligned
        self.left = offset
        self.file = self.path.open('wb', buffering=0)
        self._write(len(text).to_bytes(8, 'little') + text)

    def append(self, rows: np.ndarray) -> None:
        """The next rows; raises WorkError when there is no space."""
        data = np.ascontiguousarray(rows).view(np.uint8).reshape(-1)
        self.left -= data.size
        if self.left < 0:
            raise ValueError(f'{self.path}: more rows than the header promises')
        self._write(memoryview(data))

    def _write(self, data: Any) -> None:
        view = memoryview(data)
        while len(view):
            view = view[self.file.write(view) :]

    def close(self) -> None:
        self.file.close()
        if self.left:
            raise WorkError(f'{self.path} lacks {self.left} bytes of its tensors; write it again')
