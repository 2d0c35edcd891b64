"""Every key of a training config with its default; experiment files start from here and change what they are about."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from elastic_jax.arch import LETTERS, Arch, Rope, unknown_name
from elastic_jax.data.pipeline import default_data_config
from elastic_jax.errors import UserError


def default_config() -> ConfigDict:
    """The config that every experiment starts from."""
    config = ConfigDict()
    config.name = 'experiment'
    config.seed = 0
    # The parent: a pattern and one entry for each letter in it (fields as in arch.py). Not read when parent.checkpoint is given.
    config.arch = ConfigDict({'pattern': '', 'vocab': 0, 'embed': 0, 'norm_eps': 1e-5, 'tied': False, 'unit_blocks': 1})
    config.arch.update({kind.__name__.lower(): ConfigDict() for kind in LETTERS.values()})
    # An imported or earlier checkpoint to start from, instead of a pretrain stage.
    # `scratch` is a control: the slice of the budget it names begins from random weights, and the parent only teaches.
    config.parent = ConfigDict({'checkpoint': '', 'budget': 'full', 'scratch': ''})
    # G of each blocked axis (layout.py): the largest tensor- or expert-parallel size the checkpoint is meant for.
    config.layout = ConfigDict({'mlp': 1, 'shared_width': 1, 'experts': 1, 'kv_heads': 1})
    # Budget -> share of the parent's cost (up to 1.0) or absolute cost, measured by `metric`:
    # parameters, active_parameters, or memory (bytes of weights and caches at metric_context tokens).
    config.budgets = ConfigDict({'full': 1.0})
    config.metric = 'parameters'
    config.metric_context = 4096
    # Budget -> widths given by hand, such as 'embed=96,mlp=256'; then the router leaves that budget alone.
    config.widths = ConfigDict(convert_dict=False)
    config.tolerance = 0.05
    # Axis -> the widths (or shares of the parent's width) the router chooses among; `per_layer` axes differ by block.
    config.choices = ConfigDict(convert_dict=False)
    config.per_layer = ()
    # Shares of channel axes are rounded to the accelerator's tile (in models of which a width holds at least four).
    config.choice_multiple = 128
    config.router = ConfigDict(
        {
            'lr': 1e-2,
            'weight': 1.0,
            'dead_zone': 0.05,
            'anchor': 10.0,
            'start_temperature': 1.0,
            'end_temperature': 0.05,
            'start_scale': 1.0,
            'end_scale': 10.0,
        }
    )
    # Batches of the training data that importance is measured on; `layer_batches` of them rank the layers (0: not ranked).
    # `order`: by 'importance', or the control 'random'.
    config.calibrate = ConfigDict({'batches': 8, 'batch_size': 8, 'context': 256, 'layer_batches': 1, 'order': 'importance'})
    # 'frozen' (the parent), 'cached' (its logits by `elastic cache-teacher`), 'self' (the full budget), 'none' (cross-entropy).
    config.teacher = 'frozen'
    # Where the parent's logits are kept: the top k of every token, and the mass of all others (`tail`).
    config.teacher_cache = ConfigDict({'path': '', 'k': 32, 'tail': True})
    config.data = default_data_config()
    config.optimizer = ConfigDict(
        {
            'lr': 1e-4,
            'final_lr': 1e-5,
            'warmup': 50,
            'schedule': 'cosine',
            'b1': 0.9,
            'b2': 0.98,
            'weight_decay': 0.0,
            'clip': 1.0,  # the largest norm of the gradient; 0: not clipped
        }
    )
    # Stages by name, run in the order of `curriculum`.
    config.curriculum = ()
    config.stages = ConfigDict()
    config.dtype = 'float32'  # of the matmuls; parameters and optimiser stay float32
    config.remat = False  # keep only the layers' inputs and compute the rest again in the backward pass
    config.scan_layers = False  # repeated layers as loops: on pods, compile time then follows the distinct layers
    # 'auto': Pallas kernels on TPU; 'xla': none; 'pallas': also on NVIDIA GPUs, where they have not been timed yet, and on CPU,
    # where TPU's are interpreted (model/kernels.py).
    config.kernels = 'auto'
    # Sizes of the mesh axes; -1: all remaining devices (parallel/mesh.py).
    config.mesh = ConfigDict({'replica': 1, 'fsdp': -1, 'expert': 1, 'tensor': 1})
    config.loss_chunk = 512
    config.max_bad_steps = 10
    config.checkpoint = ConfigDict({'every': 200, 'keep': 2})
    config.eval = ConfigDict({'every': 0, 'batches': 8, 'batch_size': 8, 'context': 256})
    # More evaluators, run with the evaluation above for every budget: name -> {'data': FILE} or {'task': FILE} (evaluators.py).
    # A file is read as the data above, but for the keys given with it, such as 'field'.
    config.evaluators = ConfigDict(convert_dict=False)
    config.samples = ConfigDict({'prompts': (), 'tokens': 120, 'temperature': 0.0})
    config.log_every = 10
    # Weights & Biases: off without a project. TensorBoard's files are always written.
    config.wandb = ConfigDict({'project': '', 'entity': '', 'mode': 'online'})
    # Global steps to trace with JAX's profiler, into WORKDIR/profile (0 steps: none).
    config.profile = ConfigDict({'start': 0, 'steps': 0})
    # For `elastic plan`: budget -> the widths that a search is expected to find, such as 'embed=96,mlp=256'.
    config.plan = ConfigDict({'widths': ConfigDict(convert_dict=False)})
    config.compilation_cache = ''
    return config


def stage(kind: str, steps: int, context: int, batch_size: int, **changes: Any) -> ConfigDict:
    """The config of one stage; `changes` set any of its other keys."""
    config = ConfigDict(
        {
            'kind': kind,
            'steps': steps,
            'context': context,
            'batch_size': batch_size,
            'accumulate': 1,
            # Elastic stages: 'weighted' trains all budgets every step with these weights, 'sampled' draws `per_step` of them.
            'mode': 'weighted',
            'per_step': 1,
            'sandwich': False,
            'probabilities': ConfigDict(convert_dict=False),
            # Pretraining: the step of the experts' correction biases, and the weight of the auxiliary balancing loss.
            'balance_rate': 0.0,
            'balance_loss': 0.0,
            # Keys of config.optimizer that differ in this stage.
            'optimizer': ConfigDict(convert_dict=False),
            # Keys of config.data that differ in this stage, such as weights={'code': 0.7, 'chat': 0.3}.
            'data': ConfigDict(convert_dict=False),
        }
    )
    for key, value in changes.items():
        if key not in config:
            raise UserError(unknown_name('key of a stage', key, list(config)))
        config[key] = ConfigDict(value, convert_dict=False) if isinstance(value, dict) else value
    return config


def build_arch(config: ConfigDict) -> Arch:
    """The parent that `config.arch` describes. Raises UserError naming the key that is wrong."""
    mixers = {}
    for kind in LETTERS.values():
        name = kind.__name__.lower()
        fields = config.arch[name].to_dict()
        if fields:
            if isinstance(fields.get('rope'), dict):
                fields['rope'] = Rope(**fields['rope'])
            try:
                mixers[name] = kind(**fields)
            except TypeError as error:
                known = ', '.join(kind.__dataclass_fields__)
                raise UserError(f'config.arch.{name}: {error}; its keys are {known}') from error
    own = {key: config.arch[key] for key in ('vocab', 'embed', 'norm_eps', 'tied', 'unit_blocks')}
    if not config.arch.pattern:
        raise UserError('config.arch.pattern is empty: write one letter per block, such as MEM*- (M E * -)')
    return Arch.from_pattern(config.arch.pattern, **mixers, **own)
