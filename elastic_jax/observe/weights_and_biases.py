"""A run's numbers for Weights & Biases; its client sends them in the background. Imported when `config.wandb` asks for it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from typing import Any

import wandb
from etils import epath
from ml_collections import ConfigDict

from elastic_jax.errors import UserError
from elastic_jax.observe.sinks import appendable, scalars


class WeightsAndBiases:
    """Logs to one W&B run per workdir, whose id `WORKDIR/wandb.json` keeps.

    Steps that W&B has already when a run resumes it passes over: they would be the same numbers again.
    """

    def __init__(self, config: ConfigDict, workdir: epath.Path):
        path = workdir / 'wandb.json'
        if not path.exists():
            path.write_text(json.dumps({'id': secrets.token_hex(6)}))
        try:
            self.run = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity or None,
                mode=config.wandb.mode,
                name=config.name,
                id=json.loads(path.read_text())['id'],
                resume='allow',
                config=json.loads(config.to_json()),
                dir=os.fspath(workdir) if appendable(workdir) else None,
            )
        except wandb.Error as error:
            raise UserError(
                f'Weights & Biases did not start ({str(error).strip().splitlines()[0]}); run `wandb login`, or take '
                "--config.wandb.mode=offline, or --config.wandb.project=''"
            ) from error

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        if found := scalars(kind, values):
            self.run.log(found, step=step)

    def saved(self, step: int) -> None:
        """Nothing: the client sends as it goes."""

    def close(self) -> None:
        self.run.finish()
