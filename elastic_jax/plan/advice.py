"""What to change in a config when a program does not fit in memory, the largest part first, or sends more than it needs to."""

from __future__ import annotations

from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.sharding import data_parallelism
from elastic_jax.plan.compiled import Compiled
from elastic_jax.train.curriculum import Stage
from elastic_jax.train.setup import Plan


def changes(name: str, compiled: Compiled | None, plan: Plan, place: Placement) -> list[str]:
    """Sentences that name config keys; none for a program that fits and gathers its parameters."""
    if compiled is None:
        return []
    if compiled.fits:
        return _for_traffic(name, compiled, plan, place)
    stored = sum(compiled.memory.get(part, 0) for part in ('parameters', 'optimizer', 'teacher'))
    if name.startswith('decode/'):
        return [
            f'{name}: more than one chip holds; decode on several chips, or with a shorter context than {plan.stages[-1].context}'
        ]
    of_state, of_batch = _for_state(name, plan, place), _for_batch(name, plan, place)
    return of_state + of_batch if stored > compiled.total / 2 else of_batch + of_state


def _for_state(name: str, plan: Plan, place: Placement) -> list[str]:
    shape = place.mesh.shape
    spread = shape['fsdp'] * shape['expert'] * shape['tensor']
    wider = [size for size in range(shape['fsdp'] + 1, place.mesh.size + 1) if _splits(size, plan, place)]
    if shape['replica'] > 1 and wider:
        return [
            f'{name}: parameters and optimiser are split {spread} ways over {place.mesh.size} chips; '
            f'take config.mesh.fsdp={wider[-1]} and config.mesh.replica=-1'
        ]
    return [f'{name}: parameters and optimiser are already split {spread} ways; take a topology with more chips']


def _for_traffic(name: str, compiled: Compiled, plan: Plan, place: Placement) -> list[str]:
    """Of a gather over the whole of a three-dimensional torus the TPU compiler makes an all-reduce (libtpu 0.0.52)."""
    fsdp, found = place.mesh.shape['fsdp'], compiled.collectives
    fewer = [size for size in range(2, fsdp) if fsdp % size == 0 and _splits(size, plan, place)]
    if name.startswith('decode/') or not fewer or found is None or found['all-gather'].count:
        return []
    return [
        f'{name}: the compiler fetches parameters over {fsdp} chips by all-reduce, which sends them twice; '
        f'take config.mesh.fsdp={fewer[-1]} and config.mesh.replica=-1'
    ]


def _splits(fsdp: int, plan: Plan, place: Placement) -> bool:
    others = place.mesh.shape['expert'] * place.mesh.shape['tensor']
    return plan.parent.embed % fsdp == 0 and place.mesh.size % (fsdp * others) == 0


def _for_batch(name: str, plan: Plan, place: Placement) -> list[str]:
    stage = next(stage for stage in plan.stages if stage.name == name.partition('/')[0])
    found, parts = [], data_parallelism(place.mesh)
    rows = stage.batch_size // parts // stage.config.accumulate
    if not plan.config.remat:
        found.append(f"{name}: keep only the layers' inputs: config.remat=True")
    if rows > 1:
        pieces = stage.batch_size // parts
        found.append(
            f'{name}: {rows} sequences are on a chip at a time; take config.stages.{stage.name}.accumulate={pieces}, '
            f'or config.stages.{stage.name}.batch_size={parts}'
        )
    else:
        found += _for_one_sequence(name, stage)
    if plan.config.loss_chunk > 512:
        found.append(f'{name}: smaller pieces of logits: config.loss_chunk=512')
    return found


def _for_one_sequence(name: str, stage: Stage) -> list[str]:
    """More chips or tensor parallelism would not help: the layers' inputs of a sequence are whole on its chip."""
    own, sampled = f'config.stages.{stage.name}', stage.config.mode == 'sampled' and stage.config.per_step == 1
    fewer = f"draw one budget a step: {own}.mode='sampled' and {own}.per_step=1, or take "
    shorter = f'a shorter context: {own}.context={stage.context // 2}'
    several = stage.kind == 'elastic' and not sampled and '/' not in name
    return [f'{name}: one sequence of {stage.context} tokens is on a chip; {fewer if several else "take "}{shorter}']
