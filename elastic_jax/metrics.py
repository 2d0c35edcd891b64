"""metrics.jsonl: one JSON object per line, written without holding up the device.

On a local disk lines are appended as they come. Object stores cannot append: there every save writes one object of its own.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from elastic_jax.errors import UserError
from elastic_jax.observe.sinks import Sink, Uploads, appendable


class MetricsWriter:
    """Writes a run's metrics, and hands them to `sinks` (observe/sinks.py). Close it.

    `resume_step` keeps the lines up to that step: a resumed run takes the others again. `ended`: that is the step at which the
    last stage ends, and what comes after the line that says so (the last evaluation) is written again as well.
    """

    def __init__(
        self,
        workdir: epath.Path,
        resume_step: int | None = None,
        enabled: bool = True,
        sinks: Sequence[Sink] = (),
        ended: bool = False,
    ):
        self.workdir, self.enabled, self.pending, self.last = epath.Path(workdir), enabled, [], 0
        self.local, self.sinks, self.uploads, self.file = appendable(workdir), tuple(sinks), None, None
        if enabled and self.local:
            path = Path(workdir) / 'metrics.jsonl'
            kept = [line for line in read_metrics(workdir) if line['step'] <= resume_step] if resume_step is not None else []
            temporary = path.with_suffix('.tmp')
            temporary.write_text(_text(_until_the_end(kept) if ended else kept))
            temporary.replace(path)
            self.file = path.open('a')
        elif enabled:
            self.uploads = Uploads()
            for path in self._objects():
                if resume_step is None or int(path.stem) > resume_step:
                    path.unlink()
                elif ended and int(path.stem) == resume_step:
                    path.write_text(_text(_until_the_end([json.loads(line) for line in path.read_text().splitlines()])))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line. Arrays become lists, non-finite numbers strings (JSON has none)."""
        if not self.enabled:
            return
        self.last = step
        line = json.dumps({'kind': kind, 'step': step, **to_json(values)})
        if self.local:
            self.file.write(line + '\n')
            self.file.flush()
        else:
            self.pending.append(line + '\n')
        for sink in self.sinks:
            sink.write(kind, step, values)

    def saved(self, step: int) -> None:
        """Called with every checkpoint: on an object store, writes what has gathered since the last."""
        if self.pending:
            self.uploads.write(self.workdir / 'metrics' / f'{step:09d}.jsonl', ''.join(self.pending).encode())
            self.pending = []
        for sink in self.sinks:
            sink.saved(step)

    def close(self) -> None:
        """Writes what is left and waits for it."""
        if self.uploads is not None:
            self.saved(self.last)
            self.uploads.close()
        if self.file is not None:
            self.file.close()
        for sink in self.sinks:
            sink.close()

    def _objects(self) -> list[epath.Path]:
        folder = self.workdir / 'metrics'
        return sorted(folder.glob('*.jsonl')) if folder.exists() else []


def _text(lines: Sequence[dict[str, Any]]) -> str:
    return ''.join(json.dumps(line) + '\n' for line in lines)


def _until_the_end(lines: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """The lines up to the last one that a stage ends with."""
    ends = [n for n, line in enumerate(lines) if line['kind'] == 'stage' and line.get('event') == 'end']
    return lines[: ends[-1] + 1] if ends else lines


def read_metrics(workdir: epath.PathLike, say: Callable[[str], None] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a run, in order; a last line cut short by a kill is left out.

    Damaged lines are passed over, and `say` (default: stderr) is told how many, in which file, at which lines. Raises UserError
    for a line that has no kind and step.
    """
    workdir = epath.Path(workdir)
    single = workdir / 'metrics.jsonl'
    for path in [single] if single.exists() else sorted((workdir / 'metrics').glob('*.jsonl')):
        lines, damaged = path.read_bytes().split(b'\n'), []
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line) if line.strip() else None
            except (json.JSONDecodeError, UnicodeDecodeError):
                # What follows the last line break is a line that was being written.
                damaged += [number] if number < len(lines) else []
                continue
            if found is None:
                continue
            if not isinstance(found, dict) or not isinstance(found.get('kind'), str) or not isinstance(found.get('step'), int):
                raise UserError(f'{workdir} has metrics that are not of this program: {str(found)[:80]!r} has no kind and step')
            yield found
        if damaged:
            shown = ', '.join(map(str, damaged[:5])) + (f' and {len(damaged) - 5} more' if len(damaged) > 5 else '')
            sentence = f'{path}: {len(damaged)} damaged lines are passed over (line {shown})'
            (say or _say)(sentence.replace('1 damaged lines are', '1 damaged line is') if len(damaged) == 1 else sentence)


def _say(sentence: str) -> None:
    print(f'elastic: {sentence}', file=sys.stderr)


def to_json(value: Any) -> Any:
    """Plain JSON values from arrays, numpy scalars and nested containers."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return to_json(np.asarray(value).tolist())
    if isinstance(value, float):
        return float(f'{value:.7g}') if math.isfinite(value) else str(value)
    return value
