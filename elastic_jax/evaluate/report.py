"""`report.html` and `pareto.png` of a run: one page without network, and one picture."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping

from etils import epath

from elastic_jax.errors import UserError, WorkError
from elastic_jax.evaluate import sections_evidence, sections_result, sections_time, sections_training
from elastic_jax.evaluate.page import page, section
from elastic_jax.evaluate.pareto import pareto_png
from elastic_jax.evaluate.run_log import RunLog, read_run, with_baselines

SECTIONS = (
    sections_result.headline,
    sections_result.cards,
    sections_result.quality,
    sections_result.result_table,
    sections_evidence.costs,
    sections_evidence.baselines,
    sections_evidence.any_size,
    sections_result.nested_widths,
    sections_training.losses,
    sections_evidence.evaluators,
    sections_training.frozen_widths,
    sections_training.router,
    sections_training.experts,
    sections_time.time_spent,
    sections_result.samples,
    sections_training.to_come,
)


def write_report(workdir: epath.PathLike, baselines: Mapping[str, epath.PathLike] | None = None) -> epath.Path:
    """Writes `report.html` (and `pareto.png` once budgets are scored) and returns the page's path.

    `baselines`: workdirs of other runs by name, whose trained budgets stand beside this run's.
    Works on a run in progress: what is not there yet is said. Raises UserError when the workdir holds no run or its files are
    damaged, WorkError when the report cannot be written.
    """
    workdir = epath.Path(workdir)
    log = with_baselines(read_run(workdir), baselines or {})
    try:
        body = ''.join(build(log) for build in SECTIONS) + _config(log)
        picture = _picture(log)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f'{workdir}/metrics.jsonl has lines that do not fit together ({error!r}); it was edited, or is of another version'
        ) from error
    try:
        (workdir / 'report.html').write_text(page(f'{log.name} · elastic_jax', body))
        if picture:
            (workdir / 'pareto.png').write_bytes(picture)
    except OSError as error:
        raise WorkError(f'cannot write the report to {workdir}: {error}; free space or check the permissions') from error
    return workdir / 'report.html'


def _picture(log: RunLog) -> bytes | None:
    if not log.final or not math.isfinite(log.final['parent']['bits_per_byte']):
        return None
    return pareto_png(log.final['rows'], log.final['parent'])


def _config(log: RunLog) -> str:
    text = html.escape(json.dumps(log.config, indent=1))
    return section('Config', f'<details><summary>every key</summary><pre>{text}</pre></details>')
