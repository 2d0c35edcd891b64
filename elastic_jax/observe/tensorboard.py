"""A run's numbers for TensorBoard, in `WORKDIR/tensorboard`: `tensorboard --logdir WORKDIR`.

Events carry the run's own steps. A local file grows with every line. An object store gets one object per save, so that a run
there shows what its checkpoints hold; reading them from `gs://` is up to TensorBoard, whose installation must know the store.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from elastic_jax.observe.sinks import Uploads, appendable, scalars


class TensorBoard:
    """Writes event files. Resuming at `resume_step` drops later events, which the run takes again; None drops all."""

    def __init__(self, folder: epath.Path, resume_step: int | None = None):
        self.folder, self.resume_step, self.began = folder, resume_step, int(time.time())
        self.local, self.file, self.last = appendable(folder), None, 0
        self.pending: list[bytes] = []
        self.uploads = None if self.local else Uploads()
        for path in sorted(folder.glob('events.out.tfevents.*')) if folder.exists() else ():
            _keep_until(path, -1 if resume_step is None else resume_step, self.local)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(kind, values).items()]
        if not found:
            return
        self.last = step
        event = record(Event(wall_time=time.time(), step=step, summary=Summary(value=found)))
        if not self.local:
            self.pending.append(event)
            return
        if self.file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = Path(self._path(self.resume_step or 0)).open('ab')  # noqa: SIM115
            self.file.write(self._opening())
        self.file.write(event)
        self.file.flush()

    def saved(self, step: int) -> None:
        if self.pending:
            self.uploads.write(self._path(step), self._opening() + b''.join(self.pending))
            self.pending = []

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.uploads is not None:
            self.saved(self.last)
            self.uploads.close()

    def _path(self, step: int) -> epath.Path:
        # TensorBoard reads files in the order of their names.
        return self.folder / f'events.out.tfevents.{self.began}.{step:09d}'

    def _opening(self) -> bytes:
        """What a file begins with; the first one of a resumed run makes a TensorBoard that is open drop the later steps."""
        start, step = record(Event(wall_time=time.time(), file_version='brain.Event:2')), self.resume_step
        if step is None:
            return start
        self.resume_step = None
        resumed = Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
        return start + record(resumed)


def record(event: Event) -> bytes:
    """An event as a TFRecord."""
    data = event.SerializeToString()
    length = struct.pack('<Q', len(data))
    return length + struct.pack('<I', masked_crc32c(length)) + data + struct.pack('<I', masked_crc32c(data))


def records(content: bytes) -> Iterator[tuple[bytes, Event]]:
    """The TFRecords of a file and their events; a last one cut short by a kill is left out."""
    at = 0
    while at + 12 <= len(content):
        end = at + 16 + struct.unpack_from('<Q', content, at)[0]
        if end > len(content):
            return
        yield content[at:end], Event.FromString(content[at + 12 : end - 4])
        at = end


def _keep_until(path: epath.Path, step: int, local: bool) -> None:
    """Takes the events after `step` out of a file, and the file away when no numbers are left."""
    content, kept, numbers = path.read_bytes(), [], 0
    for raw, event in records(content):
        is_number = event.WhichOneof('what') == 'summary'
        if not is_number or event.step <= step:
            kept.append(raw)
            numbers += is_number
    if not numbers:
        path.unlink()
    elif (rest := b''.join(kept)) != content:
        if local:
            temporary = path.parent / f'.{path.name}.tmp'
            temporary.write_bytes(rest)
            temporary.replace(path)
        else:
            path.write_bytes(rest)
