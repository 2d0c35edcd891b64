"""What a run has written so far, read back for the report: its config and its metrics, sorted by kind."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from elastic_jax.errors import UserError
from elastic_jax.metrics import read_metrics

Line = dict[str, Any]
PROSE = ('text', 'prompt', 'note', 'name', 'stage', 'budget', 'process_start')
NON_FINITE = ('nan', 'inf', '-inf')


@dataclasses.dataclass(frozen=True)
class StageSpan:
    """One stage of the config: global steps (start, end], its kind, tokens per sequence and sequences per batch."""

    name: str
    kind: str
    start: int
    end: int
    context: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class RunLog:
    """A run read from its workdir.

    Attributes:
      lines: the metrics by kind, in order. damaged: what could not be read.
      frontier: the candidates of `elastic pareto` in WORKDIR/pareto.
      baselines: the trained budgets of other runs, each with the tokens of its run.
    """

    name: str
    config: Mapping[str, Any]
    stages: tuple[StageSpan, ...]
    lines: Mapping[str, Sequence[Line]]
    damaged: tuple[str, ...] = ()
    frontier: tuple[Line, ...] = ()
    baselines: Mapping[str, Line] = dataclasses.field(default_factory=dict)

    def of(self, kind: str) -> Sequence[Line]:
        return self.lines.get(kind, ())

    @property
    def final(self) -> Line | None:
        """The last stage's result, once there is one."""
        return self.of('final')[-1] if self.of('final') else None

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgets, largest first."""
        if self.final:
            return tuple(row['name'] for row in self.final['rows'])
        if self.of('frozen'):
            return tuple(self.of('frozen')[-1]['budgets'])
        budgets = self.config.get('budgets', {})
        return tuple(sorted(budgets, key=lambda name: -float(budgets[name])))

    @property
    def step(self) -> int:
        """The last logged step."""
        return max((line['step'] for line in self.of('train')), default=0)

    @property
    def steps(self) -> int:
        return self.stages[-1].end if self.stages else 0

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum((stage.end - stage.start) * stage.context * stage.batch_size for stage in self.stages)

    @property
    def current_stage(self) -> StageSpan | None:
        """The stage of the next step; none once all are done."""
        return next((stage for stage in self.stages if self.step < stage.end), None)


def read_run(workdir: epath.PathLike) -> RunLog:
    """Reads a workdir, also of a run in progress. Raises UserError when it holds no run or cannot be read."""
    workdir = epath.Path(workdir)
    try:
        if not (workdir / 'config.json').exists():
            raise UserError(f'{workdir} holds no run (there is no config.json); give the --workdir of elastic train')
        config = json.loads((workdir / 'config.json').read_text())
        lines: dict[str, list[Line]] = {}
        damaged: list[str] = []
        for line in read_metrics(workdir, damaged.append):
            lines.setdefault(line['kind'], []).append(_numbers(line))
        frontier = _frontier(workdir / 'pareto' / 'frontier.csv')
    except UnicodeDecodeError as error:
        raise UserError(f'{workdir} has a config that is not text ({error}); restore the file') from error
    except json.JSONDecodeError as error:
        raise UserError(f'{workdir}/config.json is not JSON ({error}); restore it') from error
    except OSError as error:
        raise UserError(f'cannot read {workdir}: {error}; check the path and its permissions') from error
    try:
        return RunLog(str(config.get('name', workdir.name)), config, _stages(config), lines, tuple(damaged), frontier)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{workdir}/config.json is not the config of a training run ({error!r}); restore it') from error


def with_baselines(log: RunLog, workdirs: Mapping[str, epath.PathLike]) -> RunLog:
    """The run with the budgets that other runs trained, each under the name given to its run.

    Raises: UserError when one of them is no finished run.
    """
    found: dict[str, Line] = {}
    for name, workdir in workdirs.items():
        other = read_run(workdir)
        if not other.final:
            raise UserError(f'the baseline {name} in {workdir} has no result yet; let its run end first')
        stages = [other.config['stages'][stage] for stage in other.config['curriculum']]
        given = [dict(stage.get('probabilities', {})) for stage in stages if stage['kind'] == 'elastic']
        trained = lambda budget, given=given: not given or any(not own or own.get(budget) for own in given)
        for row in other.final['rows']:
            if trained(row['name']):
                full_name = name if len(other.final['rows']) == 1 else f'{name}: {row["name"]}'
                found[full_name] = row | {'tokens': other.tokens}
    return dataclasses.replace(log, baselines=found)


def _frontier(path: epath.Path) -> tuple[Line, ...]:
    """The rows of a frontier.csv; none where there is no such file."""
    if not path.exists():
        return ()
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        numbers = ('cost', 'bits_per_byte')
        # Without a step: of a version that did not write it.
        own = lambda row: {'frontier': row['frontier'] == '1', 'step': int(row['step']) if row.get('step') else None}
        return tuple(row | {key: float(row[key]) for key in numbers} | own(row) for row in rows)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f'{path} is no frontier of elastic pareto ({error!r}); write it again, or delete it') from error


def _stages(config: Mapping[str, Any]) -> tuple[StageSpan, ...]:
    spans, start = [], 0
    for name in config['curriculum']:
        own = config['stages'][name]
        end = start + own['steps']
        spans.append(StageSpan(name, own['kind'], start, end, own['context'], own['batch_size']))
        start = end
    return tuple(spans)


def _numbers(value: Any, key: str = '') -> Any:
    """Non-finite numbers, which JSON cannot hold and metrics.py writes as strings, as floats again."""
    if isinstance(value, dict):
        return {name: _numbers(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item, key) for item in value]
    return float(value) if isinstance(value, str) and value in NON_FINITE and key not in PROSE else value
