"""The quickstart shrunk to seconds: all four mixers, all three kinds of stage. Read by tests as a config file."""

from ml_collections import ConfigDict

from elastic_jax.train.config import default_config, stage


def get_config(arg: str = '') -> ConfigDict:
    """`arg` may hold `by_hand` (widths given, no search), `sampled` (budgets drawn per step)."""
    options = set(filter(None, arg.split(',')))
    config = default_config()
    config.name = 'tiny'
    config.arch.update({'pattern': 'M*E-', 'vocab': 264, 'embed': 16})
    config.arch.mamba.update({'heads': 4, 'head_dim': 4, 'groups': 2, 'state': 8, 'chunk': 8})
    config.arch.attention.update({'kv_heads': 2, 'query_heads': 2, 'head_dim': 4})
    config.arch.mlp.update({'width': 32})
    config.arch.moe.update({'experts': 4, 'expert_width': 16, 'top_k': 2, 'shared_width': 16})
    config.budgets = ConfigDict({'full': 1.0, 'mid': 0.75, 'small': 0.5})
    config.calibrate.update({'batches': 2, 'batch_size': 2, 'context': 32})
    config.eval.update({'every': 4, 'batches': 1, 'batch_size': 4, 'context': 32})
    config.log_every = 1
    config.mesh.fsdp = 1
    config.checkpoint.update({'every': 3, 'keep': 2})
    config.stages.pretrain = stage('pretrain', 8, 32, 4, balance_rate=1e-3)
    config.stages.short = stage('elastic', 5, 32, 4, accumulate=2)
    config.stages.long = stage('elastic', 4, 64, 2, probabilities={'full': 0.5, 'mid': 0.3, 'small': 0.2})
    if 'sampled' in options:
        config.stages.short.update({'mode': 'sampled', 'per_step': 2})
    if 'by_hand' in options:
        config.widths.update({'mid': 'embed=12,mlp=16', 'small': 'embed=8,mlp=16,layers=3'})
        config.curriculum = ('pretrain', 'short', 'long')
    else:
        config.choices.update({'embed': (1.0, 0.75, 0.5), 'mlp': (1.0, 0.5), 'expert_width': (1.0, 0.5), 'layers': (4, 3)})
        config.per_layer = ('mlp',)
        config.stages.search = stage('search', 4, 32, 4, per_step=2)
        config.curriculum = ('pretrain', 'search', 'short', 'long')
    return config
