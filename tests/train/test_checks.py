"""What a config gets wrong is said before anything starts: keys that nothing reads, numbers and names that cannot be."""

import pytest

from elastic_jax.config_file import load_config
from elastic_jax.errors import UserError
from elastic_jax.train.checks import config_problems
from elastic_jax.train.setup import make_plan
from tests.train.tiny_experiment import get_config


def with_changes(changes):
    config = get_config('by_hand')
    for path, value in changes.items():
        *sections, key = path.split('.')
        own = config
        for section in sections:
            own = own[section]
        own[key] = value
    return config


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('dtpye', 'bfloat16', r"unknown key in config 'dtpye'; did you mean 'dtype'"),
        ('optimizer.warm_up', 5, r"unknown key in config.optimizer 'warm_up'; did you mean 'warmup'"),
        ('arch.norm_epsilon', 1e-6, r"unknown key in config.arch 'norm_epsilon'; did you mean 'norm_eps'"),
        ('stages.short.batchsize', 8, r"unknown key in config.stages.short 'batchsize'; did you mean 'batch_size'"),
        ('stages.short.optimizer', {'rate': 1.0}, r"unknown key in config.stages.short.optimizer 'rate'"),
        ('stages.long.optimizer', {'schedule': 'cosin'}, r"unknown schedule 'cosin'; did you mean 'cosine'"),
        ('stages.long.optimizer', {'lr': 0.0}, r'optimizer.lr=0.0 must be above 0'),
        ('stages.long.accumulate', 0, r'does not split into accumulate=0'),
        ('dtype', 'bf16', r"unknown dtype 'bf16'; did you mean 'bfloat16'"),
        ('log_every', 0, r'config.log_every=0 must be at least 1'),
        ('max_bad_steps', 0, r'config.max_bad_steps=0 must be at least 1'),
        ('checkpoint.every', 0, r'config.checkpoint.every=0 must be at least 1'),
        ('checkpoint.keep', 0, r'config.checkpoint.keep=0 must be at least 1'),
        ('calibrate.batches', 0, r'config.calibrate.batches=0 must be at least 1'),
        ('curriculum', ('pretrain', 'short', 'short'), r"'short' is there twice"),
        ('optimizer.warmup', -5, r'config.optimizer.warmup=-5 must be at least 0'),
        ('optimizer.b1', 1.5, r'config.optimizer.b1=1.5 must be at least 0 and below 1'),
        ('stages.long.optimizer', {'final_lr': -1.0}, r'config.stages.long.optimizer.final_lr=-1.0 must be at least 0'),
        ('stages.long.optimizer', {'clip': 'no'}, r"config.stages.long.optimizer.clip='no' must be at least 0"),
        ('router.start_temperature', 0.0, r'config.router.start_temperature=0.0 must be above 0'),
        ('layout.mlp', 0, r'config.layout.mlp=0 must be at least 1'),
        ('layout.mpl', 2, r"unknown key in config.layout 'mpl'; did you mean 'mlp'"),
        ('choice_multiple', 0, r'config.choice_multiple=0 must be at least 1'),
        ('metric_context', 0, r'config.metric_context=0 must be at least 1'),
        ('tolerance', -1.0, r'config.tolerance=-1.0 must be at least 0'),
        ('calibrate.layer_batches', -1, r'config.calibrate.layer_batches=-1 must be at least 0'),
        ('samples.tokens', 0, r'config.samples.tokens=0 must be at least 1'),
        ('budgets', {'mid': '0.75'}, r"config.budgets.mid='0.75' must be a number"),
        ('choices', {'embed': 0.5}, r'config.choices.embed=0.5 must be a list of widths'),
        ('widths', {'mid': {'embed': 12}}, r"config.widths.mid=\{'embed': 12\} must be a text, such as 'embed=96"),
        ('stages.long.probabilities', {'full': 'a'}, r'stages.long.probabilities must be numbers of at least 0'),
        ('stages.long.probabilities', {'full': float('nan')}, r'stages.long.probabilities must be numbers of at least 0'),
    ],
    ids=lambda value: value if isinstance(value, str) and '(' not in value else '',
)
def test_a_mistake_is_named_with_its_key(path, value, message):
    with pytest.raises(UserError, match=message):
        make_plan(with_changes({path: value}))


def test_a_mistake_that_all_stages_share_is_said_once():
    config = get_config('by_hand')
    config.data.loss = 'answer'
    with pytest.raises(UserError) as refused:
        make_plan(config)
    assert str(refused.value).count("unknown data.loss 'answer'") == 1


def test_no_stage_is_called_what_the_end_of_a_run_is_called():
    config = get_config('by_hand')
    config.stages.done = config.stages.short
    config.curriculum = ('pretrain', 'done')
    with pytest.raises(UserError, match="'done' is what the end of a run is called"):
        make_plan(config)


def test_the_full_budget_teaches_only_where_every_step_trains_it():
    """A step without it would distil from whichever budget is the largest of its draw."""
    refused = r"teacher='self' distils from the full budget, but stages.short does not train one in every step"
    drawn = {'stages.short.mode': 'sampled', 'stages.short.per_step': 2, 'teacher': 'self'}
    make_plan(with_changes({'teacher': 'self'}))
    make_plan(with_changes(drawn | {'stages.short.sandwich': True}))
    make_plan(with_changes(drawn | {'stages.short.per_step': 3}))
    for changes in (drawn, {'teacher': 'self', 'stages.short.probabilities': {'mid': 0.5, 'small': 0.5}}):
        with pytest.raises(UserError, match=refused):
            make_plan(with_changes(changes))


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('x = 1\ndef get_config(:\n', 'line 2: SyntaxError: invalid syntax'),
        ('def get_config(arg=""):\n    return nothing\n', "line 2: NameError: name 'nothing' is not defined"),
        ('import not_there_at_all\n', "line 1: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ('def get_config(arg=""):\n\n    return 1 / 0\n', 'line 3: ZeroDivisionError: division by zero'),
    ],
    ids=['syntax', 'name', 'import', 'work'],
)
def test_a_config_file_that_fails_is_said_with_its_line(tmp_path, text, message):
    path = tmp_path / 'own.py'
    path.write_text(text)
    with pytest.raises(UserError, match=f'own.py, {message}'):
        load_config(str(path))


@pytest.mark.parametrize('name', ['quickstart', 'star_elastic_nano_v3', 'nemotron_elastic_12b'])
def test_every_key_that_an_experiment_sets_is_one_that_is_read(name):
    assert config_problems(load_config(f'experiments/{name}.py')) == []
