"""The smallest run with a parent, an ordering and nested sizes, for tests that start it many times in real processes."""

from pathlib import Path

from ml_collections import ConfigDict

from elastic_jax.train.config import default_config, stage

PRETRAIN, ELASTIC = 6, 14
LAST_STEP = PRETRAIN + ELASTIC


def get_config(arg: str = '') -> ConfigDict:
    """`arg`: the folder of its texts. Tasks are the JSONL files beside that folder."""
    config = default_config()
    config.name = 'small'
    config.arch.update({'pattern': '*-', 'vocab': 264, 'embed': 16})
    config.arch.attention.update({'kv_heads': 2, 'query_heads': 1, 'head_dim': 4})
    config.arch.mlp.update({'width': 32})
    config.layout.update({'mlp': 2, 'kv_heads': 2})
    config.budgets = ConfigDict({'full': 1.0, 'small': 0.5})
    config.widths.update({'small': 'embed=8,mlp=16'})
    config.data.update({'path': arg, 'heldout_fraction': 0.2})
    config.calibrate.update({'batches': 1, 'batch_size': 4, 'context': 32, 'layer_batches': 0})
    config.eval.update({'batches': 1, 'batch_size': 4, 'context': 32})
    if arg:
        config.evaluators.texts = {'data': arg, 'context': 32, 'batch_size': 4, 'batches': 2}
        for path in Path(arg).parent.glob('*.jsonl'):
            config.evaluators[path.stem] = {'task': str(path)}
    config.log_every = 1
    config.checkpoint.update({'every': 3, 'keep': 3})
    config.stages.pretrain = stage('pretrain', PRETRAIN, 32, 8)
    config.stages.short = stage('elastic', ELASTIC, 32, 8)
    config.curriculum = ('pretrain', 'short')
    return config
