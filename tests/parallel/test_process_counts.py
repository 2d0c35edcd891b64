"""A run may change its number of processes and its mesh: nothing is lost or repeated of the data, and the numbers stay."""

import json
import os
import signal
import zlib
from itertools import islice

import pytest

from elastic_jax.data.pipeline import make_iterator
from elastic_jax.metrics import read_metrics
from tests.parallel.pods import PACED, Place, place  # noqa: F401
from tests.parallel.small_experiment import LAST_STEP, PRETRAIN, get_config

pytestmark = pytest.mark.slow

# Every process writes which rows it puts on its devices, as they reach them.
RECORDING = """
import os, sys, zlib
from elastic_jax.cli import main
from elastic_jax.parallel.placement import Placement
put, log = Placement.put_batch, open(LOG + '.' + os.environ.get('ELASTIC_PROCESS_ID', '0'), 'a')
def recorded(self, batch, batch_size):
    numbers = [n for first, last in self.rows(batch_size) for n in range(first, last)]
    print(*(f'{n}:{zlib.crc32(row.tobytes())}' for n, row in zip(numbers, batch['tokens'], strict=True)), file=log, flush=True)
    return put(self, batch, batch_size)
Placement.put_batch = recorded
main(sys.argv[1:])
"""


def expected_rows(texts) -> list[set[str]]:
    """Of every step of the run, 'row:checksum' in the one global order, made by one process."""
    config, found = get_config(str(texts)), []
    for stage, start in ((config.stages.pretrain, 0), (config.stages.short, PRETRAIN)):
        batches = make_iterator(
            config.data, split='train', batch_size=stage.batch_size, context=stage.context, seed=config.seed + start
        )
        for batch in islice(batches, stage.steps):
            found.append({f'{n}:{zlib.crc32(row.tobytes())}' for n, row in enumerate(batch['tokens'])})
    return found


def rows_of(log, processes: int) -> list[list[str]]:
    """Of every step, what all processes together put on their devices."""
    parts = [(log.parent / f'{log.name}.{n}').read_text().splitlines() for n in range(processes)]
    return [[row for part in step for row in part.split()] for step in zip(*parts, strict=True)]


def test_from_four_processes_to_two_on_another_mesh_to_one(place: Place):  # noqa: F811
    alone, changing = place.root / 'one', place.root / 'changing'
    place.start(alone, '--config.profile.start=8', '--config.profile.steps=2', processes=1).end()
    assert list((alone / 'profile').rglob('*.xplane.pb')), 'a profile of the window'

    def start(log, processes, devices, *more):
        script = PACED + RECORDING.replace('LOG', repr(str(place.root / log)))
        command = place.scripted(script, place.train(changing, *more))
        return place.start(changing, processes=processes, devices=devices, command=command)

    seen = []
    for log, processes, devices, more, stop in (
        ('a', 4, 1, ('--config.mesh.fsdp=2', '--config.mesh.tensor=2'), 4),
        ('b', 2, 1, (), 10),
        ('c', 1, 2, ('--config.mesh.fsdp=1', '--config.mesh.tensor=2'), None),
    ):
        pod = start(log, processes, devices, *more)
        if stop:
            pod.until_step(changing, stop)
            os.kill(pod.processes()[-1], signal.SIGTERM)
        output = pod.end()
        assert stop is None or 'run the same command to go on' in output
        seen += rows_of(place.root / log, processes)

    expected = expected_rows(place.root / 'texts')
    assert len(seen) == len(expected) == LAST_STEP
    for step, (found, own) in enumerate(zip(seen, expected, strict=True)):
        assert set(found) == own, f'step {step}'
    losses = [[line['loss'] for line in read_metrics(run) if line['kind'] == 'train'] for run in (alone, changing)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_evaluators_and_samples_are_those_of_one_process(place: Place):  # noqa: F811
    tasks = {'choose': [{'context': 'ab', 'choices': ['c', 'xyz'], 'answer': 0}], 'say': [{'prompt': 'ab', 'answer': 'c'}]}
    for name, lines in tasks.items():
        (place.root / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    scores, texts = [], []
    for processes in (1, 2):
        workdir = place.root / f'by{processes}'
        short = ('--config.stages.pretrain.steps=2', '--config.stages.short.steps=2', "--config.samples.prompts=('a', 'bcd')")
        place.start(workdir, *short, processes=processes).end()
        lines = [line for line in read_metrics(workdir) if line['kind'] in ('evaluator', 'samples')]
        found = [line for line in lines if line['kind'] == 'evaluator']
        scores.append(
            {(line['budget'], line['evaluator'], key): value for line in found for key, value in line['scores'].items()}
        )
        texts.append({(line['budget'], line['prompt']): line['text'] for line in lines if line['kind'] == 'samples'})
    assert {key[:2] for key in scores[0]} == {(size, name) for size in ('full', 'small') for name in ('texts', *tasks)}
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert len(texts[0]) == 4 and texts[1] == texts[0]
