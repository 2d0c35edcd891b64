"""The parent that every claim starts from: a small hybrid (Mamba-2, attention, MLP), pretrained until its loss flattens.

  elastic train --config experiments/claims/parent.py --workdir runs/claims/parent

The scripts beside this file train it by themselves when it is not there. Sizes, chosen by the argument:

  ''     0.75 M parameters, 2.5 M bytes of the standard library's source: about 10 minutes of one core
  long   the same for four times as long, until it has flattened: an hour of one core
  medium 2.1 M parameters, 5 M bytes: about 40 minutes of one core
  large  4.9 M parameters, 33 M bytes: hours on two cores, minutes on a GPU
  smoke  60 k parameters, seconds: only shows that all runs
"""

from ml_collections import ConfigDict

from elastic_jax.errors import UserError
from elastic_jax.train.config import default_config, stage

# embed, MLP width, Mamba heads, blocks; steps, context and batch of pretraining.
SIZES = {
    '': ((128, 512, 16, 'M-*-M-'), (1200, 256, 8)),
    'long': ((128, 512, 16, 'M-*-M-'), (4800, 256, 8)),
    'medium': ((192, 1024, 24, 'M-*-M-'), (2500, 256, 8)),
    'large': ((256, 1024, 32, 'M-*-M-M-*-M-'), (4000, 512, 16)),
    'smoke': ((32, 64, 8, 'M-*-M-'), (30, 64, 4)),
}


def get_config(arg: str = '') -> ConfigDict:
    """The parent of one of the SIZES."""
    if arg not in SIZES:
        raise UserError(f'the claims come in sizes {", ".join(map(repr, SIZES))}; got {arg!r}')
    (embed, mlp, heads, pattern), (steps, context, batch_size) = SIZES[arg]
    config = default_config()
    config.name = 'claims-parent'
    config.arch.update({'pattern': pattern, 'vocab': 264, 'embed': embed})
    config.arch.mamba.update({'heads': heads, 'head_dim': embed // 8, 'groups': heads // 8, 'state': 16, 'chunk': 32})
    config.arch.attention.update({'kv_heads': 2, 'query_heads': 2, 'head_dim': embed // 4})
    config.arch.mlp.update({'width': mlp})
    config.optimizer.update({'lr': 4e-3, 'final_lr': 1e-4, 'warmup': 50})
    config.curriculum = ('pretrain',)
    config.stages.pretrain = stage('pretrain', steps, context, batch_size)
    config.eval.update({'every': max(10, steps // 12), 'batches': 6 if steps > 30 else 1, 'batch_size': 8, 'context': 256})
    config.checkpoint.update({'every': 200, 'keep': 1})
    return config
