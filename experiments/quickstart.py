"""Quickstart: one small hybrid parent, trained on real text, becomes one checkpoint with three nested models.

Shows: the whole method in one command. A parent with all four mixers is pretrained on the Python standard library's source,
ordered by importance, its widths searched by the router, and three budgets distilled together on static slices.

  elastic train --config experiments/quickstart.py --workdir runs/quickstart         at most 10 minutes on two cores
  elastic train --config experiments/quickstart.py:smoke --workdir runs/smoke        at most 2 minutes, from a cold start

Expected: `small` starts far above its parent and elastic training closes most of that gap; `full` stays within 1 % of the
parent. The table at the end says so in bits per byte on held-out files. The shapes are valid Nemotron-H shapes (relu²,
untied, no rotary), so every slice exports to Hugging Face.
"""

from ml_collections import ConfigDict

from elastic_jax.errors import UserError
from elastic_jax.train.config import default_config, stage


def get_config(arg: str = '') -> ConfigDict:
    """The experiment; `smoke` is the same job cut short."""
    if arg not in ('', 'smoke'):
        raise UserError(f'quickstart.py takes no argument or smoke, got {arg!r}')
    config = default_config()
    config.name = 'quickstart'
    config.arch.update({'pattern': 'ME-M*E-', 'vocab': 264, 'embed': 128})
    config.arch.mamba.update({'heads': 16, 'head_dim': 16, 'groups': 4, 'state': 32, 'chunk': 32})
    config.arch.attention.update({'kv_heads': 2, 'query_heads': 4, 'head_dim': 32})
    config.arch.mlp.update({'width': 384})
    config.arch.moe.update({'experts': 8, 'expert_width': 128, 'top_k': 2, 'shared_width': 128, 'scale': 1.0})

    config.budgets = ConfigDict({'full': 1.0, 'mid': 0.7, 'small': 0.45})
    config.choices.update(
        {
            'embed': (1.0, 0.875, 0.75, 0.625),
            'mamba_heads': (1.0, 0.75, 0.5),
            'mlp': (1.0, 0.75, 0.5, 0.25),
            'experts': (1.0, 0.75, 0.5),
            'expert_width': (1.0, 0.75, 0.5),
            'shared_width': (1.0, 0.5),
        }
    )
    config.optimizer.update({'lr': 7e-4, 'final_lr': 7e-5, 'warmup': 20})
    config.curriculum = ('pretrain', 'search', 'short', 'long')
    config.stages.pretrain = stage(
        'pretrain', 800, 256, 8, balance_rate=1e-3, optimizer={'lr': 4e-3, 'final_lr': 2e-4, 'warmup': 50}
    )
    config.stages.search = stage('search', 100, 256, 8, per_step=1, optimizer={'lr': 3e-4})
    config.stages.short = stage('elastic', 200, 256, 8)
    config.stages.long = stage('elastic', 40, 1024, 2, probabilities={'full': 0.5, 'mid': 0.3, 'small': 0.2})
    config.calibrate.update({'batches': 8, 'batch_size': 8, 'context': 256, 'layer_batches': 0})
    config.eval.update({'batches': 12, 'batch_size': 8, 'context': 256})
    # Greedily a model this small soon writes nothing but spaces.
    config.samples.update({'prompts': ('def read(self, ', 'import os\n'), 'temperature': 0.7})
    config.checkpoint.update({'every': 150, 'keep': 2})
    if arg == 'smoke':
        config.arch.pattern = 'ME*-'
        config.stages.pretrain.steps = 60
        config.stages.search.steps = 10
        config.stages.short.steps = 10
        config.stages.long.steps = 4
        config.calibrate.batches = 2
        config.eval.batches = 2
        config.samples.prompts = ()
    return config
