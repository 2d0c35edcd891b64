"""What tests of training share."""

import pytest


def parent_config():
    from tests.train.tiny_experiment import get_config

    config = get_config('by_hand')
    config.arch.pattern, config.curriculum, config.stages.pretrain.steps = '*-', ('pretrain',), 3
    config.budgets = {'full': 1.0}
    config.widths = {}
    config.eval.every = 0
    return config


@pytest.fixture(scope='session')
def parent(tmp_path_factory):
    """The workdir of a parent pretrained alone, for three steps; tests must leave it as it is."""
    from elastic_jax.train.loop import train

    workdir = tmp_path_factory.mktemp('parent')
    train(parent_config(), workdir)
    return workdir
