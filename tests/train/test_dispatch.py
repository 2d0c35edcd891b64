"""Nothing waits for the device: the numbers of a step are fetched when the next one is on its way."""

import pytest

from elastic_jax.train import loop
from elastic_jax.train.reporting import StepReport
from tests.parallel.pods import write_texts
from tests.parallel.small_experiment import LAST_STEP, PRETRAIN, get_config


@pytest.mark.slow
def test_a_step_is_dispatched_before_the_one_before_is_looked_at(tmp_path, monkeypatch):
    write_texts(tmp_path / 'texts')
    events = []
    make, report = loop._step_function, StepReport.__call__

    def spied(run, stage):
        step_fn = make(run, stage)

        def step(state, batch, n):
            events.append(('dispatched', stage.start + n + 1))
            return step_fn(state, batch, n)

        return step

    def fetched(self):
        events.append(('fetched', self.step))
        report(self)

    monkeypatch.setattr(loop, '_step_function', spied)
    monkeypatch.setattr(StepReport, '__call__', fetched)
    config = get_config(str(tmp_path / 'texts'))
    config.mesh.fsdp = 1
    config.checkpoint.every = 7
    loop.train(config, tmp_path / 'run')
    # A checkpoint comes after its step's line; a stage ends with its own.
    waited_for = {7, 14, PRETRAIN}
    for step in range(1, LAST_STEP):
        behind = events.index(('fetched', step)) > events.index(('dispatched', step + 1))
        assert behind == (step not in waited_for), step
