"""Progress of a run on stderr: a live line on a terminal, a plain line now and then in a log file or a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from elastic_jax.evaluate.summary import duration
from elastic_jax.terminal import in_notebook

LOG_SECONDS = 15.0


class RunProgress:
    """Says stage, step, losses per budget, tokens/s and the time left.

    The time left is an estimate over all stages: each stage's work in FLOPs, at the FLOPs per second of the recent steps.
    """

    def __init__(self, work_by_stage: Mapping[str, float], enabled: bool = True):
        # Notebooks show stderr in red, and rich's live display there fails where ipywidgets is not installed. Rich takes anything
        # for a terminal where FORCE_COLOR is set, as it is in every notebook.
        notebook = in_notebook()
        self.enabled, self.live = enabled, sys.stderr.isatty() and not notebook
        self.console = Console(stderr=not notebook, highlight=False, force_jupyter=False, force_terminal=self.live)
        self.work, self.done = dict(work_by_stage), dict.fromkeys(work_by_stage, 0.0)
        self.speed, self.last_logged = 0.0, 0.0
        self.bar = Progress(
            TextColumn('[bold]{task.fields[stage]}'), BarColumn(24), TextColumn('{task.fields[text]}'), console=self.console
        )
        self.task = None

    def __enter__(self) -> RunProgress:
        if self.enabled and self.live:
            self.bar.start()
            self.task = self.bar.add_task('run', total=1.0, stage='', text='')
        return self

    def __exit__(self, *error: object) -> None:
        if self.task is not None:
            self.bar.stop()

    def say(self, message: str) -> None:
        """One line above the bar."""
        if self.enabled:
            self.console.print(message, soft_wrap=True, markup=False)

    def update(
        self, stage: str, step: int, steps: int, losses: Mapping[str, float], tokens_per_second: float, seconds: float
    ) -> None:
        """After a step: `seconds` is what the step took, leaving compilation out."""
        if not self.enabled:
            return
        for name in self.work:  # in their order: of a run that goes on, stages before this one are done
            if name == stage:
                break
            self.done[name] = self.work[name]
        self.done[stage] = self.work[stage] * step / steps
        if seconds > 0:
            now = self.work[stage] / steps / seconds
            self.speed = now if not self.speed else 0.95 * self.speed + 0.05 * now
        left = (sum(self.work.values()) - sum(self.done.values())) / self.speed if self.speed else float('nan')
        shown = ' '.join(f'{name} {loss:.3f}' for name, loss in losses.items())
        text = f'{step}/{steps}  {shown}  {tokens_per_second:,.0f} tokens/s  {duration(left)} left'
        if self.live:
            self.bar.update(self.task, completed=sum(self.done.values()) / sum(self.work.values()), stage=stage, text=text)
        elif time.monotonic() - self.last_logged > LOG_SECONDS or step == steps:
            self.last_logged = time.monotonic()
            self.console.print(f'{stage} {text}', soft_wrap=True, markup=False)
