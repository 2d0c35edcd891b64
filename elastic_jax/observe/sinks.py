"""Where the lines of a run go besides metrics.jsonl, and what of them a chart can show."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from elastic_jax.arch import unknown_name
from elastic_jax.errors import UserError

WANDB_MODES = ('online', 'offline', 'disabled')


class Sink(Protocol):
    """Takes the lines of a run: `values` are numbers, text, arrays, or dicts and lists of them."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...

    def saved(self, step: int) -> None:
        """A checkpoint is being written: what this writes now goes with it."""

    def close(self) -> None: ...


def scalars(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by name, such as 'train/loss/small'; 'eval/small/loss' in a line that is about one budget."""
    prefix = f'{kind}/{values["budget"]}' if isinstance(values.get('budget'), str) else kind
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= scalars(f'{prefix}/{key}', value)
        elif isinstance(value, bool | int | float) or (
            isinstance(value, jax.Array | np.ndarray | np.generic) and value.ndim == 0
        ):
            found[f'{prefix}/{key}'] = float(value)
    return found


def appendable(workdir: epath.PathLike) -> bool:
    """Whether files there can grow; on object stores they cannot, and every save writes one object of its own."""
    return '://' not in os.fspath(workdir)


class Uploads:
    """Writes whole objects in the background, one after the other; a failure is raised by the next call."""

    def __init__(self) -> None:
        self.thread, self.running = ThreadPoolExecutor(1, 'elastic-metrics'), None

    def write(self, path: epath.Path, content: bytes) -> None:
        """Adds to the object if a save of the same step has made it already."""
        self._wait()
        self.running: Future[None] | None = self.thread.submit(_write, path, content)

    def close(self) -> None:
        self._wait()
        self.thread.shutdown()

    def _wait(self) -> None:
        if self.running is not None:
            running, self.running = self.running, None
            running.result()


def _write(path: epath.Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((path.read_bytes() if path.exists() else b'') + content)


def check_observing(config: ConfigDict) -> None:
    """Raises UserError when `config.wandb` or `config.profile` cannot be followed."""
    if config.wandb.project:
        if config.wandb.mode not in WANDB_MODES:
            raise UserError(unknown_name('config.wandb.mode', config.wandb.mode, list(WANDB_MODES)))
        if importlib.util.find_spec('wandb') is None:
            raise UserError(
                f'config.wandb.project={config.wandb.project} asks for Weights & Biases, which is not installed; '
                "`pip install wandb`, or --config.wandb.project=''"
            )
    if config.profile.steps and importlib.util.find_spec('libtpu') and jax.default_backend() != 'tpu':
        platforms = jax.config.jax_platforms
        if not platforms or 'tpu' in platforms:
            raise UserError(
                "config.profile asks for a trace, and JAX's profiler crashes where libtpu is installed and there is no TPU; set "
                f'the environment variable JAX_PLATFORMS={jax.default_backend()}'
            )
    if config.profile.start < 0 or config.profile.steps < 0:
        raise UserError(
            f'config.profile has start={config.profile.start}, steps={config.profile.steps}; expected the step to start at, '
            'from 0, and how many to trace (0: none)'
        )


def open_sinks(config: ConfigDict, workdir: epath.Path, resume_step: int | None) -> tuple[Sink, ...]:
    """TensorBoard always, Weights & Biases when `config.wandb.project` is set. Raises UserError when that cannot start."""
    from elastic_jax.observe.tensorboard import TensorBoard

    sinks: list[Sink] = [TensorBoard(workdir / 'tensorboard', resume_step)]
    if config.wandb.project:
        from elastic_jax.observe.weights_and_biases import WeightsAndBiases

        sinks.append(WeightsAndBiases(config, workdir))
    return tuple(sinks)
