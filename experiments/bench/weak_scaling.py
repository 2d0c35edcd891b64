"""Weak scaling without the hardware: the elastic step over the full budget's step, one sequence per chip, by the TPU compiler.

  python experiments/bench/weak_scaling.py                                            8 to 512 chips, minutes for each
  python experiments/bench/weak_scaling.py --topologies v5p:4x4x4 --config.arch.pattern='MEMEM*E'
  python experiments/bench/weak_scaling.py --show FILE.jsonl                          the table of an earlier run's --json lines

Every row compiles two programs for a topology: the step of all budgets and the teacher, and that of the full budget alone with
the same teacher. The batch grows with the chips; parameters are split over `fsdp` up to --fsdp ways, and the other chips are
replicas.
All numbers are for one chip: HBM, what it sends (bytes by kind of collective, as `elastic plan` counts them), the compiler's
estimate of cycles, in which kernels and collectives are not. Ideal weak scaling: every column but HBM stays as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from elastic_jax.config_file import load_config
from elastic_jax.plan.chips import GIB, topology_devices
from elastic_jax.plan.planner import plan_run
from elastic_jax.plan.table import aligned

TOPOLOGIES = ('v5p:2x2x2', 'v5p:2x4x4', 'v5p:4x4x4', 'v5p:4x4x8', 'v5p:8x8x4', 'v5p:8x8x8')
# One block of each kind at the published widths: what compiles in minutes. Its budgets are shares of so much of the model.
CONFIG = (
    '--config=experiments/star_elastic_nano_v3.py:one_period',
    '--config.arch.pattern=M*E',
    '--config.budgets.mid=0.8',
    '--config.budgets.small=0.6',
)
SENT = ('all-gather', 'reduce-scatter', 'all-reduce')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--topologies', default=','.join(TOPOLOGIES), help='comma-separated')
    parser.add_argument('--stage', default='short', help='which elastic stage')
    parser.add_argument('--fsdp', type=int, default=64, help='how many ways parameters are split at most')
    parser.add_argument('--json', action='store_true', help='one JSON line for each topology, as soon as it is known')
    parser.add_argument('--show', metavar='FILE', help='print the table of these JSON lines; compile nothing')
    arguments, overrides = parser.parse_known_args()
    if arguments.show:
        rows = [json.loads(line) for line in Path(arguments.show).read_text().splitlines()]
    else:
        rows = []
        for topology in arguments.topologies.split(','):
            rows.append(measure(topology, arguments, overrides))
            if arguments.json:
                print(json.dumps(rows[-1]), flush=True)
    if not arguments.json:
        print('\n'.join(table(rows)))


def measure(topology: str, arguments: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """What the two programs take on one chip of a topology."""
    config, _ = load_config([*CONFIG, *overrides], 'plan')
    chips = len(topology_devices(topology).devices)
    config.mesh.update({'replica': -1, 'fsdp': min(chips, arguments.fsdp)})
    for name in config.curriculum:
        config.stages[name].batch_size = chips
    programs = {'elastic': arguments.stage, 'full': f'{arguments.stage}/full'}
    say = lambda line: print(line, file=sys.stderr, flush=True)
    planned = plan_run(config, topology, tuple(programs.values()), say)
    result: dict[str, Any] = {'topology': topology, 'chips': chips, 'mesh': planned.mesh}
    for (name, _), row in zip(programs.items(), planned.rows, strict=True):
        if row.compiled is None or row.compiled.collectives is None:
            result[name] = {'problem': row.problem or f'wants {row.compiled.total / GIB:.0f} GiB'}
            continue
        sent = {kind: found.to_json() for kind, found in row.compiled.collectives.items() if found.count}
        own = {'hbm': row.compiled.total, **row.compiled.memory, 'cycles': row.compiled.cycles, 'sent': sent}
        result[name] = own | {'flops': row.flops, 'compile_seconds': round(row.compiled.compile_seconds)}
    return result


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: elastic / full, and their ratio."""
    lines = [['chips', 'fsdp × replica', 'HBM GiB', *(f'{kind} GB' for kind in SENT), 'all sent', 'Mcycles']]
    for row in rows:
        both = [row['elastic'], row['full']]
        begin = [str(row['chips']), f'{row["mesh"]["fsdp"]} × {row["mesh"]["replica"]}']
        if any('problem' in one for one in both):
            lines.append([*begin, '; '.join(f'{name}: {row[name].get("problem", "compiles")}' for name in ('elastic', 'full'))])
            continue
        size = lambda one, kind: one['sent'].get(kind, {'bytes': 0})['bytes'] / 1e9
        everything = [sum(found['bytes'] for found in one['sent'].values()) / 1e9 for one in both]
        lines.append(
            [
                *begin,
                pair(*(one['hbm'] / GIB for one in both), '.1f'),
                *(pair(*(size(one, kind) for one in both)) for kind in SENT),
                pair(*everything),
                pair(*(one['cycles'] / 1e6 for one in both), '.0f'),
            ]
        )
    wide = [line for line in lines if len(line) == len(lines[0])]
    narrow = [' '.join(line) for line in lines if len(line) != len(lines[0])]
    return [*aligned(wide), *narrow]


def pair(elastic: float, full: float, form: str = '.2f') -> str:
    ratio = f' ({elastic / full:.2f})' if full else ''
    return f'{elastic:{form}} / {full:{form}}{ratio}'


if __name__ == '__main__':
    main()
