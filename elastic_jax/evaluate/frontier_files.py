"""What `elastic pareto` writes and prints: all candidates as CSV, the frontier's widths for `slice --widths`, a table."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import shlex
import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath

from elastic_jax.errors import UserError, WorkError
from elastic_jax.evaluate.frontier_picture import frontier_png
from elastic_jax.evaluate.summary import human, percent

# Cost -> (what it is called, unit of `human`; None: seconds).
COSTS: dict[str, tuple[str, str | None]] = {
    'parameters': ('parameters', ''),
    'active': ('active parameters', ''),
    'memory': ('bytes to serve', 'B'),
    'flops': ('FLOPs per token', ''),
    'latency': ('time of a decoding step', None),
}


@dataclasses.dataclass(frozen=True)
class FrontierRow:
    """One candidate.

    Attributes:
      name: of a trained budget. origin: how it was found. widths: as `--widths` takes them.
      cost: in the cost that was asked for; latency in seconds, as the table predicts it. target: the cost it was to have.
      bits_per_byte: under masks; sliced_bits_per_byte: of the slice itself, where that was run to confirm it.
      measured_latency: seconds of a decoding step of the slice itself, where latency was asked for and it was run.
    """

    frontier: bool
    name: str
    origin: str
    cost: float
    bits_per_byte: float
    parameters: int
    active_parameters: int
    memory_bytes: int
    flops_per_token: int
    widths: str
    target: float | None = None
    sliced_bits_per_byte: float | None = None
    measured_latency: float | None = None

    @property
    def shown(self) -> bool:
        return self.sliced_bits_per_byte is not None


@dataclasses.dataclass(frozen=True)
class Frontier:
    """All candidates, cheapest first, and what they are compared with.

    Attributes:
      cost: a key of COSTS. how: the conditions that it was measured under. checkpoint: where slices come from; step: its step.
      full_cost: of the checkpoint's own full widths. parent_bits_per_byte: of the frozen parent, where the run kept it.
    """

    cost: str
    how: str
    checkpoint: str
    step: int
    rows: Sequence[FrontierRow]
    full_cost: float
    parent_bits_per_byte: float | None = None

    @property
    def best(self) -> list[FrontierRow]:
        """The rows on the frontier."""
        return [row for row in self.rows if row.frontier]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def write(self, out: epath.PathLike) -> None:
        """Writes frontier.csv, frontier.png and widths.json. Raises WorkError when that fails."""
        out = epath.Path(out)
        files = {'frontier.csv': self.csv().encode(), 'frontier.png': self.png(), 'widths.json': self.widths_json().encode()}
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                temporary = out / f'.{name}.tmp'
                temporary.write_bytes(content)
                temporary.replace(out / name)
        except OSError as error:
            raise WorkError(f'{out} cannot be written ({error.strerror}); free space or check the permissions') from error

    def csv(self) -> str:
        """Every candidate, a line each; empty where something was not measured."""
        text = io.StringIO()
        names = [field.name for field in dataclasses.fields(FrontierRow)]
        writer = csv.writer(text, lineterminator='\n')
        writer.writerow([*names, 'cost_of', 'checkpoint', 'step'])
        for row in self.rows:
            values = [*(getattr(row, name) for name in names), self.cost, self.checkpoint, self.step]
            writer.writerow(['' if value is None else int(value) if isinstance(value, bool) else value for value in values])
        return text.getvalue()

    def widths_json(self) -> str:
        """The widths of the frontier, cheapest first: a JSON list of texts, one a line, each a value of `slice --widths`."""
        return '[\n' + ',\n'.join(f' {json.dumps(row.widths)}' for row in self.best) + '\n]\n'

    def png(self) -> bytes:
        return frontier_png(
            [row for row in self.rows if row.bits_per_byte < float('inf')],
            f'{COSTS[self.cost][0]} ({self.how})' if self.how else COSTS[self.cost][0],
            self.text_of,
            self.parent_bits_per_byte,
            self.full_cost,
        )

    def text_of(self, cost: float) -> str:
        """A cost for people."""
        unit = COSTS[self.cost][1]
        return f'{1e3 * cost:.3g} ms' if unit is None else human(cost, unit)

    def table(self, out: os.PathLike[str] | str) -> str:
        """The confirmed rows for a terminal, and the commands that slice them."""
        latency = self.cost == 'latency'
        head = ['', 'size', COSTS[self.cost][0], 'of full', 'bits/byte', 'as slice', *(['measured'] if latency else [])]
        full = next((row.bits_per_byte for row in self.rows if row.cost == self.full_cost), None)
        head += ['' if full is None else 'over full', '']
        lines, commands = [head], []
        shown = [row for row in self.rows if row.shown]
        for number, row in enumerate(shown, 1):
            measured = [self.text_of(row.measured_latency)] if row.measured_latency is not None else ['']
            lines.append(
                [
                    str(number),
                    row.name or row.origin,
                    self.text_of(row.cost),
                    percent(row.cost / self.full_cost),
                    f'{row.bits_per_byte:.4f}',
                    f'{row.sliced_bits_per_byte:.4f}',
                    *(measured if latency else []),
                    '' if full is None else percent(row.bits_per_byte / full - 1, 2),
                    '' if row.frontier else 'another is better',
                ]
            )
            size = f'--budget {shlex.quote(row.name)}' if row.name else f'--widths {row.widths}'
            out_of = shlex.quote(str(epath.Path(out) / f'size_{number}'))
            commands.append(f'{number}: elastic slice --checkpoint {shlex.quote(self.checkpoint)} {size} --out {out_of}')
        sizes = [max(len(line[n]) for line in lines) for n in range(len(head))]
        pad = lambda n, cell: cell.ljust(sizes[n]) if n in (1, len(head) - 1) else cell.rjust(sizes[n])
        aligned = ['  '.join(pad(n, cell) for n, cell in enumerate(line)).rstrip() for line in lines]
        return '\n'.join([*aligned, *self._misses(shown), '', *commands])

    def _misses(self, shown: Sequence[FrontierRow]) -> list[str]:
        """How far measured latencies are from the predicted ones, in a line."""
        ratios = [row.measured_latency / row.cost for row in shown if row.measured_latency is not None and row.cost]
        if not ratios:
            return []
        median = statistics.median(ratios)
        return ['', f'measured over predicted: median {median:.2f}, from {min(ratios):.2f} to {max(ratios):.2f}']


def check_folder(out: epath.PathLike) -> None:
    """Raises UserError when `out` cannot be a folder, before the long work and without making it."""
    there = next(path for path in (epath.Path(out).resolve(), *epath.Path(out).resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f'{out} cannot be made: {there} is no folder that can be written to; give another --out')
