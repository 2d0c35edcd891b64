"""Weak scaling without the hardware: what one chip stores, sends and computes as chips are added, by the TPU compiler.

  python experiments/bench/weak_scaling.py                       what the step exchanges, 8 to 512 chips: a minute for each
  python experiments/bench/weak_scaling.py --experts 64          the same with experts in 64 blocks, which are then stored whole
  python experiments/bench/weak_scaling.py --steps               whole steps, elastic over full alone: five minutes for each

Each chip has one sequence, so what it computes does not depend on their number; what it stores and exchanges does. Parameters
are split over `fsdp` up to --fsdp ways, and the other chips are replicas. The first form compiles, for every kind of block at the
published widths, fetching its parameters and reducing their gradients as the step does, and adds them up over the 52 blocks:
three fetches (teacher, forward, backward) and one reduction, the same for one budget as for three. `--steps` compiles the step of
all budgets and that of the full one alone, one block of each kind. Collectives are in GB as `elastic plan` counts them; `wire` is
what a chip sends: a gather or a reduce-scatter its bytes once, an all-reduce twice. Cycles are the compiler's estimate of copies
into another layout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from elastic_jax.config_file import load_config
from elastic_jax.model.fetch import fetch
from elastic_jax.model.params import layer_name, leaves, map_table, param_table
from elastic_jax.parallel.placement import Placement
from elastic_jax.parallel.sharding import batch_spec, fetch_ways, spec_axes
from elastic_jax.plan.chips import GIB, topology_devices
from elastic_jax.plan.compiled import compile_program, device_bytes
from elastic_jax.plan.planner import plan_run
from elastic_jax.plan.table import aligned
from elastic_jax.train.gradients import reduce_gradients
from elastic_jax.train.programs import abstract_state, abstract_teacher
from elastic_jax.train.setup import make_plan

TOPOLOGIES = ('v5p:2x2x2', 'v5p:2x4x4', 'v5p:4x4x4', 'v5p:4x4x8', 'v5p:8x8x4', 'v5p:8x8x8')
CONFIG = 'experiments/star_elastic_nano_v3.py'
FETCHES = 3
ONE_OF_EACH = ('--config.arch.pattern=M*E', '--config.budgets.mid=0.8', '--config.budgets.small=0.6')
SENT = ('all-gather', 'reduce-scatter', 'all-reduce')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--topologies', default=','.join(TOPOLOGIES), help='comma-separated')
    parser.add_argument('--fsdp', type=int, default=64, help='how many ways parameters are split at most')
    parser.add_argument('--experts', type=int, help='G of the experts (default: the config has 16)')
    parser.add_argument('--steps', action='store_true', help='compile whole steps')
    parser.add_argument('--json', action='store_true', help='one JSON line for each topology, as soon as it is known')
    arguments, overrides = parser.parse_known_args()
    measure, rows = (steps if arguments.steps else exchange), []
    for topology in arguments.topologies.split(','):
        print(f'compiling for {topology}', file=sys.stderr, flush=True)
        rows.append(measure(topology, arguments, overrides))
        if arguments.json:
            print(json.dumps(rows[-1]), flush=True)
    if not arguments.json:
        print('\n'.join(aligned([list(rows[0]), *([shown(value) for value in row.values()] for row in rows)])))


def shown(value: Any) -> str:
    return f'{value:.2f}' if isinstance(value, float) else str(value)


def sized(config: ConfigDict, chips: int, arguments: argparse.Namespace) -> ConfigDict:
    """One sequence for each chip; parameters over as many as they may be."""
    config.mesh.update({'replica': -1, 'fsdp': min(chips, arguments.fsdp)})
    config.layout.experts = arguments.experts or config.layout.experts
    for name in config.curriculum:
        config.stages[name].batch_size = chips
    return config


def exchange(topology: str, arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """What a chip stores, and what it exchanges in a step, of the whole parent."""
    target = topology_devices(topology)
    plan = make_plan(sized(load_config(CONFIG, overrides), len(target.devices), arguments), elsewhere=True)
    place, total = plan.place(target.devices), Counter()
    for pattern, blocks in Counter(plan.parent.pattern).items():
        total.update({key: blocks * value for key, value in group(place, pattern, plan.config.dtype).items()})
    total.update(group(place, '', plan.config.dtype))
    state = abstract_state(plan, plan.stages[1], place)
    stored = device_bytes((state.params, state.opt_state, abstract_teacher(plan, place))) / GIB
    sent = {f'{kind} GB': total[kind] / 1e9 for kind in SENT}
    wire = (sum(total[kind] for kind in SENT) + total['all-reduce']) / 1e9
    mesh = f'{place.mesh.shape["fsdp"]} × {place.mesh.shape["replica"]}'
    return {'chips': len(target.devices), 'fsdp × replica': mesh, 'stored GiB': stored, **sent, 'wire GB': wire,
            'copies Mcycles': total['cycles'] / 1e6}  # fmt: skip


def group(place: Placement, kind: str, dtype: str) -> Counter:
    """Bytes by kind of collective, and cycles, of the parameters of one block ('': of those outside the blocks)."""
    everything = param_table(place.parent, place.layout)
    block = layer_name(place.parent.pattern.find(kind)) if kind else ''
    table = {name: params for name, params in everything.items() if (name == block if kind else not name.startswith('layer_'))}
    specs = {name: place.specs[name] for name in table}

    def fetched(stored: Any) -> Any:
        result: dict[str, Any] = {name: dict(leaves) for name, leaves in stored.items()}
        for name, leaf, param in leaves(table):
            for way in fetch_ways(param, specs[name][leaf]):
                own = result[name][leaf]
                result[name][leaf] = fetch(own, way, own.dtype if param.float32 else jnp.dtype(dtype))
        return result

    def reduced(stored: Any, cotangents: Any) -> Any:
        grads = jax.vjp(fetched, stored)[1](cotangents)[0]
        return reduce_gradients(grads, specs, spec_axes(batch_spec(place.mesh), 0))

    params = place.abstract(map_table(lambda param: jax.ShapeDtypeStruct(param.shape, jnp.float32), table))
    whole = map_table(lambda param: PartitionSpec(), table)
    manual = lambda run, given, made: jax.jit(
        jax.shard_map(run, mesh=place.mesh, in_specs=given, out_specs=made, check_vma=False)
    )
    fetching, like = manual(fetched, (specs,), whole), place.whole
    cotangents = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=like), jax.eval_shape(fetching, params)
    )
    total: Counter = Counter()
    reducing = manual(reduced, (specs, whole), specs)
    for times, program, inputs in ((FETCHES, fetching, (params,)), (1, reducing, (params, cotangents))):
        compiled = compile_program(program, inputs, {}, sys.maxsize)
        total.update({kind: times * found.bytes for kind, found in compiled.collectives.items()})
        total.update(cycles=times * compiled.cycles)
    return total


def steps(topology: str, arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """What whole steps take on a chip, elastic and full alone, with one block of each kind."""
    config = load_config(f'{CONFIG}:one_period', [*ONE_OF_EACH, *overrides])
    config = sized(config, len(topology_devices(topology).devices), arguments)
    planned = plan_run(config, topology, ('short', 'short/full'))
    result: dict[str, Any] = {'chips': len(planned.topology.devices)}
    for name, row in zip(('elastic', 'full'), planned.rows, strict=True):
        if row.compiled is None or row.compiled.collectives is None:
            raise SystemExit(f'{topology}, {name}: {row.problem or "does not fit"}')
        result[f'{name} HBM GiB'] = row.compiled.total / GIB
        result |= {f'{name} {kind} GB': row.compiled.collectives[kind].bytes / 1e9 for kind in SENT}
        result[f'{name} Mcycles'] = row.compiled.cycles / 1e6
    return result


if __name__ == '__main__':
    main()
