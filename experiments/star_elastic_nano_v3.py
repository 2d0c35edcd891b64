"""Star Elastic's setting: Nemotron 3 Nano 30B-A3B with 23B and 12B inside one checkpoint (arXiv 2605.07182).

Shows: the published job at its real size. The router searches embedding channels, expert widths and Mamba heads at 8192 tokens;
then all three budgets are distilled together, at 8192 tokens uniformly (100B tokens with the search) and at 49152 tokens with
weights 0.5/0.3/0.2 (60B tokens). One sequence per chip of 256 v5p chips.

  elastic plan   --config experiments/star_elastic_nano_v3.py --topology v5p:8x8x4              no hardware needed
  elastic plan   --config experiments/star_elastic_nano_v3.py:one_period --topology v5p:8x8x4   one repeat of the layers
  elastic import --hf nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16 --checkpoint runs/nano_v3
  elastic train  --config experiments/star_elastic_nano_v3.py --workdir gs://BUCKET/star        with your config.data

What the stages `short` and `long` cost is in RESULTS.md, by the TPU compiler. The 23B's widths are not published; those below
are whole tiles of a TPU (23.10B, 2.78B active; 2240, 1664 and 56 Mamba heads would be 23.70B and 2.79B, and are not), and the
12B's are the published ones (12.43B).
"""

from ml_collections import ConfigDict

from elastic_jax.errors import UserError
from elastic_jax.train.config import default_config, stage

PERIOD = 'MEMEM*E'
PATTERN = PERIOD * 5 + 'MEMEMEM*E' + 'MEMEMEME'
SEQUENCES = 256  # a step: one for each chip


def get_config(arg: str = '') -> ConfigDict:
    """The experiment; `one_period` has one repeat of the layers (to plan, not to train: the checkpoint has all of them)."""
    if arg not in ('', 'one_period'):
        raise UserError(f'star_elastic_nano_v3.py takes no argument or one_period, got {arg!r}')
    config = default_config()
    config.name = 'star_elastic_nano_v3'
    config.parent.checkpoint = 'runs/nano_v3'
    config.data.tokenizer = 'runs/nano_v3/tokenizer'
    # The same shape as the checkpoint's, for planning where the checkpoint is not.
    config.arch.update({'pattern': PERIOD if arg else PATTERN, 'vocab': 131072, 'embed': 2688})
    config.arch.mamba.update({'heads': 64, 'head_dim': 64, 'groups': 8, 'state': 128})
    config.arch.attention.update({'kv_heads': 2, 'query_heads': 16, 'head_dim': 128})
    config.arch.moe.update({'experts': 128, 'expert_width': 1856, 'top_k': 6, 'shared_width': 3712, 'scale': 2.5})

    # In one period the vocabulary weighs more, and it only shrinks with embed.
    config.budgets = ConfigDict({'full': 1.0, 'mid': 0.75 if arg else 0.73, 'small': 0.45 if arg else 0.394})
    config.choices.update(
        {
            'embed': (2688, 2560, 2304, 2176, 2048, 1920),
            'expert_width': (1856, 1664, 1536, 1280, 1152, 960),
            'mamba_heads': (64, 48),
        }
    )
    config.plan.widths.update({'mid': 'embed=2176,expert_width=1664', 'small': 'embed=1920,expert_width=960'})
    # As many blocks of experts as parameters are split into: then experts are stored whole (parallel/sharding.py).
    config.layout.update({'experts': 64, 'kv_heads': 2})
    # embed is 2^7 · 21: fsdp=64 divides it, and what is left of the chips are replicas.
    config.mesh.update({'replica': -1, 'fsdp': 64})

    config.optimizer.update({'lr': 1e-4, 'final_lr': 1e-5, 'warmup': 50, 'b1': 0.9, 'b2': 0.98, 'clip': 1.0})
    config.curriculum = ('search', 'short', 'long')
    # A temperature that falls by 0.9997 a step is at 0.05 after 10,000 steps.
    config.stages.search = stage('search', 10_000, 8192, SEQUENCES)
    config.stages.short = stage('elastic', 37_700, 8192, SEQUENCES)
    last = {'full': 0.5, 'mid': 0.3, 'small': 0.2}
    config.stages.long = stage('elastic', 4_770, 49_152, SEQUENCES, probabilities=last)
    config.calibrate.update({'batches': 4, 'batch_size': SEQUENCES, 'context': 8192, 'layer_batches': 0})

    config.update({'dtype': 'bfloat16', 'remat': True, 'scan_layers': True, 'loss_chunk': 2048})
    config.eval.update({'batches': 4, 'batch_size': SEQUENCES, 'context': 8192})
    config.checkpoint.update({'every': 500, 'keep': 3})
    return config
