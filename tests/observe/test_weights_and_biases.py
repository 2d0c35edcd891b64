"""Weights & Biases by config: one run per workdir, its numbers by name and step; what is missing is one sentence."""

import importlib
import sys
import types

import pytest
from etils import epath

from elastic_jax.errors import UserError
from elastic_jax.metrics import MetricsWriter
from elastic_jax.observe.sinks import check_observing, open_sinks
from tests.train.tiny_experiment import get_config


@pytest.fixture
def service(monkeypatch):
    """A stand-in for the client's module, which keeps what is sent."""
    module = types.ModuleType('wandb')
    module.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
    module.Error, module.inits, module.logged, module.finished = type('Error', (Exception,), {}), [], [], []

    class Run:
        def log(self, values, step):
            module.logged.append((step, values))

        def finish(self):
            module.finished.append(True)

    def init(**arguments):
        if arguments['entity'] == 'nobody':
            raise module.Error('permission denied\nmore lines')
        module.inits.append(arguments)
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, 'wandb', module)
    monkeypatch.delitem(sys.modules, 'elastic_jax.observe.weights_and_biases', raising=False)
    return module


def config_for(**changes):
    config = get_config()
    config.wandb.update({'project': 'nested', **changes})
    return config


def test_a_run_and_its_resumption_are_one_run_there(service, tmp_path):
    config, workdir = config_for(), epath.Path(tmp_path)
    check_observing(config)
    for resume_step, step in ((None, 3), (3, 4)):
        writer = MetricsWriter(workdir, resume_step, sinks=open_sinks(config, workdir, resume_step))
        writer.write('train', step, stage='short', loss=0.5, **{'loss/small': 0.7})
        writer.close()
    first, second = service.inits
    assert first['project'] == 'nested' and first['config']['name'] == 'tiny' and first['resume'] == 'allow'
    assert first['id'] == second['id']
    assert service.logged == [(step, {'train/loss': 0.5, 'train/loss/small': 0.7}) for step in (3, 4)]
    assert len(service.finished) == 2


def test_without_a_project_nothing_is_sent(service, tmp_path):
    assert len(open_sinks(get_config(), epath.Path(tmp_path), None)) == 1
    assert not service.inits


def test_what_is_wrong_is_one_sentence(service, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"unknown config.wandb.mode 'onlin'; did you mean 'online'"):
        check_observing(config_for(mode='onlin'))
    with pytest.raises(UserError, match=r'did not start \(permission denied\); run `wandb login`'):
        open_sinks(config_for(entity='nobody'), epath.Path(tmp_path), None)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(UserError, match='which is not installed; `pip install wandb`'):
        check_observing(config_for())
