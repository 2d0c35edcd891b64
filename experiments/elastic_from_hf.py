"""Any imported parent becomes one checkpoint with nested budgets, given as shares of it.

Shows: from the Hugging Face hub and back. The parent is frozen as the teacher, ordered by importance, its widths searched by the
router, and the budgets distilled together; every one of them then exports to a folder that transformers and vLLM read.

  elastic import --hf DIR_OR_ID --checkpoint runs/parent
  elastic train  --config experiments/elastic_from_hf.py:runs/parent,mid=0.7,small=0.45 --workdir runs/elastic
  elastic slice  --checkpoint runs/elastic --budget small --format hf --out out/small

Costs: about (budgets + 1) forward and backward passes of the parent per token; a real parent needs an accelerator, and data of
its own (--config.data.path='texts/*.jsonl'). `:DIR,smoke` is the same job in a minute on a tiny
random parent. Expected: `full` stays within 1 % of the parent, `small` starts far above it and most of the gap closes.
"""

import math

from ml_collections import ConfigDict

from elastic_jax.arch import Arch, Attention
from elastic_jax.checkpoint.stored import read_manifest, tokenizer_folder
from elastic_jax.errors import UserError
from elastic_jax.train.config import default_config, stage

SHARES = (1.0, 0.875, 0.75, 0.625, 0.5)
AXES = ('mamba_heads', 'mlp', 'experts', 'expert_width', 'shared_width')


def get_config(arg: str = '') -> ConfigDict:
    """`arg` is the imported checkpoint, then NAME=SHARE of each budget below `full`, and perhaps `smoke`."""
    checkpoint, *options = arg.split(',')
    if not checkpoint:
        raise UserError('elastic_from_hf.py needs a checkpoint: --config experiments/elastic_from_hf.py:DIR, from elastic import')
    smoke = 'smoke' in options
    shares = dict(_share(option) for option in options if option != 'smoke') or {'mid': 0.7, 'small': 0.45}
    manifest = read_manifest(checkpoint)
    parent = manifest.arch

    config = default_config()
    config.name = 'elastic_from_hf'
    config.parent.checkpoint = checkpoint
    config.budgets = ConfigDict({'full': 1.0, **shares})
    if parent.embed < 1024:
        config.choice_multiple = 8
    own = {axis.name for axis in parent.axes()}
    config.choices.update({axis: SHARES for axis in AXES if axis in own})
    config.choices.update({'embed': _embeds(parent, config.choice_multiple)})
    if parent.pattern.strip('M') == '':
        config.choices.update(_of_mamba_alone(parent, config.choice_multiple))
    config.data.tokenizer = str(tokenizer_folder(checkpoint, manifest) or 'bytes')
    config.optimizer.update({'lr': 1e-4, 'final_lr': 1e-5, 'warmup': 50})
    config.curriculum = ('search', 'short', 'long')
    config.stages.search = stage('search', 500, 2048, 16, per_step=1)
    config.stages.short = stage('elastic', 4000, 2048, 16)
    last = {'full': 0.5, **{name: 0.5 / len(shares) for name in shares}}
    config.stages.long = stage('elastic', 1000, 8192, 4, probabilities=last)
    layer_batches = 8 if 'layers' in config.choices else 0
    config.calibrate.update({'batches': 64, 'batch_size': 8, 'context': 2048, 'layer_batches': layer_batches})
    config.eval.update({'batches': 32, 'batch_size': 8, 'context': 2048})
    config.checkpoint.update({'every': 200, 'keep': 2})
    if smoke:
        config.stages.search = stage('search', 6, 64, 4, per_step=1)
        config.stages.short = stage('elastic', 6, 64, 4)
        config.stages.long = stage('elastic', 3, 128, 2, probabilities=last)
        config.calibrate.update({'batches': 2, 'batch_size': 4, 'context': 64, 'layer_batches': min(1, layer_batches)})
        config.eval.update({'batches': 2, 'batch_size': 4, 'context': 64})
        config.log_every = 1
    return config


def _share(option: str) -> tuple[str, float]:
    name, _, share = option.partition('=')
    try:
        return name, float(share)
    except ValueError as error:
        raise UserError(f'cannot read {option!r}: write NAME=SHARE, such as small=0.45, or smoke') from error


def _embeds(parent: Arch, multiple: int) -> tuple[int, ...]:
    """Widths that keep to the chip's tile and, as Llama's format asks, to a multiple of the query heads."""
    heads = [mixer.kv_heads * mixer.query_heads for mixer in parent.mixers if isinstance(mixer, Attention) and mixer.rope]
    step = math.lcm(multiple, *heads)
    return tuple(sorted({min(parent.embed, max(1, round(share * parent.embed / step)) * step) for share in SHARES}, reverse=True))


def _of_mamba_alone(parent: Arch, multiple: int) -> dict[str, tuple[float, ...]]:
    """mamba2 in transformers holds a model whose heads together are a whole multiple of `embed`: of 1 and 1/2 every pair is,
    where the parent's are. What lies between comes from depth."""
    halves = lambda width, unit: (1.0, 0.5) if width % (2 * unit) == 0 else (1.0,)
    mamba = parent.mixers[0]
    whole = (mamba.heads * mamba.head_dim) % (2 * parent.embed) == 0
    return {
        'embed': halves(parent.embed, multiple),
        'mamba_heads': halves(mamba.heads, mamba.groups) if whole else (1.0,),
        'layers': SHARES,
    }
