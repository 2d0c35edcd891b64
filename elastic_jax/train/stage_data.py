"""What the stages of a config read, for `elastic data`: neither the parent nor its checkpoint is looked at."""

from __future__ import annotations

from ml_collections import ConfigDict

from elastic_jax.data.config import stage_data
from elastic_jax.data.show import StageData
from elastic_jax.train.curriculum import make_stages


def stages_data(config: ConfigDict) -> tuple[StageData, ...]:
    """Every stage of a config's curriculum, in order. Raises UserError naming the key that is wrong."""
    return tuple(
        StageData(
            name=stage.name,
            config=stage_data(config.data, stage.config.data),
            context=stage.context,
            batch_size=stage.batch_size,
            steps=stage.steps,
            seed=config.seed + stage.start,
        )
        for stage in make_stages(config)
    )
