"""metrics.jsonl: one JSON object per line, written without holding up the device.

On a local disk lines are appended as they come. Object stores cannot append: there every save writes one object of its own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath


class MetricsWriter:
    """Writes a run's metrics. `resume_step` keeps the lines up to that step: a resumed run takes the others again."""

    def __init__(self, workdir: epath.Path, resume_step: int | None = None, enabled: bool = True):
        self.workdir, self.enabled, self.pending = workdir, enabled, []
        self.local = '://' not in os.fspath(workdir)
        if enabled and self.local:
            path = Path(workdir) / 'metrics.jsonl'
            kept = [line for line in read_metrics(workdir) if line['step'] <= resume_step] if resume_step is not None else []
            temporary = path.with_suffix('.tmp')
            temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept))
            temporary.replace(path)
            self.file = path.open('a')

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One line. Arrays become lists, non-finite numbers strings (JSON has none)."""
        if not self.enabled:
            return
        line = json.dumps({'kind': kind, 'step': step, **to_json(values)})
        if self.local:
            self.file.write(line + '\n')
            self.file.flush()
        else:
            self.pending.append(line)

    def saved(self, step: int) -> None:
        """Called with every checkpoint: on an object store, writes what has gathered since the last."""
        if self.enabled and self.pending:
            (self.workdir / 'metrics' / f'{step:09d}.jsonl').parent.mkdir(parents=True, exist_ok=True)
            (self.workdir / 'metrics' / f'{step:09d}.jsonl').write_text('\n'.join(self.pending) + '\n')
            self.pending = []


def read_metrics(workdir: epath.PathLike) -> Iterator[dict[str, Any]]:
    """The lines of a run, in order; a last line cut short by a kill is left out."""
    workdir = epath.Path(workdir)
    single = workdir / 'metrics.jsonl'
    paths = [single] if single.exists() else sorted((workdir / 'metrics').glob('*.jsonl'))
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


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
