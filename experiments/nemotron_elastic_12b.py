"""Nemotron Elastic's setting: Nemotron Nano v2 12B, a dense hybrid, with 9B and 6B inside one checkpoint (arXiv 2511.16664).

Shows: the published job at its real size, with all its width axes: embedding channels, Mamba heads and head channels, and MLP
widths that differ by layer. 65B tokens at 8192 with the search, then 45B at 49152 with weights 0.5/0.3/0.2. One sequence per
chip of 256 v5p chips.

  elastic plan   --config experiments/nemotron_elastic_12b.py --topology v5p:8x8x4              no hardware needed
  elastic plan   --config experiments/nemotron_elastic_12b.py:one_period --topology v5p:8x8x4   one repeat of the layers
  elastic import --hf nvidia/NVIDIA-Nemotron-Nano-12B-v2 --checkpoint runs/nano_v2
  elastic train  --config experiments/nemotron_elastic_12b.py --workdir gs://BUCKET/nemotron    with your config.data

What the stages `short` and `long` cost is in RESULTS.md, by the TPU compiler. The parent has 12.31B parameters. The widths that
are planned with are not the paper's, but have its budgets' sizes (9.00B, 5.98B) on multiples of 256, the TPU's tile.
"""

from ml_collections import ConfigDict

from elastic_jax.errors import UserError
from elastic_jax.train.config import default_config, stage

PERIOD = 'M-M-M-M*-'
PATTERN = PERIOD * 6 + 'M-M-M-M-'
SEQUENCES = 256  # a step: one for each chip


def get_config(arg: str = '') -> ConfigDict:
    """The experiment; `one_period` has one repeat of the layers (to plan, not to train: the checkpoint has all of them)."""
    if arg not in ('', 'one_period'):
        raise UserError(f'nemotron_elastic_12b.py takes no argument or one_period, got {arg!r}')
    config = default_config()
    config.name = 'nemotron_elastic_12b'
    config.parent.checkpoint = 'runs/nano_v2'
    config.data.tokenizer = 'runs/nano_v2/tokenizer'
    # The same shape as the checkpoint's, for planning where the checkpoint is not.
    config.arch.update({'pattern': PERIOD if arg else PATTERN, 'vocab': 131072, 'embed': 5120})
    config.arch.mamba.update({'heads': 128, 'head_dim': 80, 'groups': 8, 'state': 128})
    config.arch.attention.update({'kv_heads': 8, 'query_heads': 5, 'head_dim': 128})
    config.arch.mlp.update({'width': 20480})

    # In one period the vocabulary weighs more, and it only shrinks with embed.
    config.budgets = ConfigDict({'full': 1.0, 'mid': 0.77 if arg else 9 / 12.31, 'small': 0.55 if arg else 6 / 12.31})
    config.choices.update(
        {
            'embed': (5120, 4608, 4096, 3584),
            'mlp': (20480, 18432, 16384, 14336, 12288, 10240),
            'mamba_heads': (128, 120, 112, 104, 96),
            'mamba_head_dim': (80, 72, 64),
        }
    )
    config.per_layer = ('mlp',)
    config.plan.widths.update({'mid': 'embed=4608,mlp=14336,mamba_heads=112', 'small': 'embed=3584,mlp=10240,mamba_heads=104'})
    config.layout.update({'mlp': 8, 'kv_heads': 8})
    config.mesh.update({'replica': -1, 'fsdp': 64})

    config.optimizer.update({'lr': 1e-4, 'final_lr': 1e-5, 'warmup': 50, 'b1': 0.9, 'b2': 0.98, 'clip': 1.0})
    config.curriculum = ('search', 'short', 'long')
    # A temperature that falls by 0.9997 a step is at 0.05 after 10,000 steps.
    config.stages.search = stage('search', 10_000, 8192, SEQUENCES)
    config.stages.short = stage('elastic', 21_000, 8192, SEQUENCES)
    last = {'full': 0.5, 'mid': 0.3, 'small': 0.2}
    # One budget a step, as the paper draws them: the activations of all three at 49152 tokens do not fit a v5p chip.
    config.stages.long = stage('elastic', 3_580, 49_152, SEQUENCES, mode='sampled', probabilities=last)
    config.calibrate.update({'batches': 4, 'batch_size': SEQUENCES, 'context': 8192, 'layer_batches': 0})

    config.update({'dtype': 'bfloat16', 'remat': True, 'scan_layers': True, 'loss_chunk': 1024})
    config.eval.update({'batches': 4, 'batch_size': SEQUENCES, 'context': 8192})
    config.checkpoint.update({'every': 500, 'keep': 3})
    return config
