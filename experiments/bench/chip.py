"""What a chip's time goes to, by the TPU compiler: each piece as XLA has it, by its kernel, and at the chip's limits.

  python experiments/bench/chip.py                                     v5p and v6e, minutes a piece
  python experiments/bench/chip.py --topology v5p:8x8x4 --pieces ssd   one of them

Forward and backward of one layer's piece at the published widths (30B: 32 query heads and 2 KV heads of 128; 64 or 56 Mamba
heads of 64, 8 groups, state 128; 128 experts of 1856, six a token), one sequence, bfloat16. Nothing runs. The limits are the
speed of a large matmul and that of the memory; `over ideal` is over the slower of both. XLA's own cycles are those it writes into
the program (`estimated_cycles`); it has none for kernels. The compiler simulates those bundle by bundle, with the waits for
matmuls and for on-chip memory: libtpu's static profile, in a process of its own for each kernel. It takes what data decides as
not done, and so skips every block of splash attention: that kernel is profiled as it is, and once more with all blocks done at a
smaller size, and the blocks on and below the diagonal are counted. Of a grid whose size is data it assumes a few steps: the
experts' products are profiled with fixed numbers of visits and of steps in a visit, from which follows what random routing
takes, and their weights' gradients for an eighth of the experts. XLA's own grouped matmul is such a kernel too, and is in no
column. The head's matmuls are XLA's in either form, and counted with its kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from chip_pieces import CORNER, EMBED, EXPERTS, HEADS_OF, PER_BLOCK, PIECES, TOKENS, TOP_K, VOCAB, WIDTH, both_ways
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import SingleDeviceSharding

from elastic_jax.hlo_cost import estimated_cycles
from elastic_jax.model import flash
from elastic_jax.model.grouped_gradient import add_product, gradient_of, visits_of
from elastic_jax.model.grouped_kernel import STEP, Grid, block_of, grid_of, multiply, product_of
from elastic_jax.model.kl_kernel import kl_and_gradient_by_kernel, top_and_sum_by_kernel
from elastic_jax.model.tiles import ROW_TILE, Chip
from elastic_jax.plan.chips import topology_devices
from elastic_jax.plan.compiled import compile_with_text

GIB = 2**30
CORES = {'v4': 2, 'v5p': 2}  # of a chip that the compiler gives one program; others have one
BYTES = {'v5p': 2765 / 1.75, 'v6e': 1640 / 1.75}  # of memory a cycle: the published GB/s over GHz
SMALL, HEADS = 4096, 2  # tokens and query heads of a KV head that blocks of attention are profiled at
PARTS = 8  # of the experts, of which the gradients of one are profiled


def every_block(length: int) -> tuple[Callable[..., Any], list[tuple[tuple[int, ...], Any]]]:
    """Splash attention that computes every block, and its arguments: what decides which to skip is taken out of it."""
    block = flash.block_size(length)
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * HEADS)
    q, k = ((2, HEADS, length, 128), jnp.bfloat16), ((2, length, 128), jnp.bfloat16)

    def run(grad: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, ids_T: jax.Array) -> Any:
        one = splash.make_splash_mqa(mask, block_sizes=flash.block_sizes(block), head_shards=1, q_seq_shards=1)
        for name in ('fwd_mask_info', 'dq_mask_info', 'dkv_mask_info'):
            setattr(one, name, getattr(one, name)._replace(data_next=None, block_mask=None, mask_next=None))
        ids = splash.SegmentIds(ids_T, ids_T)
        y, backward = jax.vjp(jax.vmap(lambda q, k, v: one(q, k, v, ids)), q, k, v)
        return y, backward(grad)

    return run, [q, q, k, k, ((length,), jnp.int32)]


def every_sum() -> tuple[Callable[..., Any], list[tuple[tuple[int, ...], Any]]]:
    """The experts' kernel of the weights' gradients, once, for a part of experts and tokens, with a visit to each expert."""
    count, rows = EXPERTS // PARTS, 8192 * TOP_K // PARTS

    def run(rows_d: jax.Array, rows_f: jax.Array, start: jax.Array, end: jax.Array) -> Any:
        _, sums = visits_of(start, end, rows)
        blocks = count // PER_BLOCK, PER_BLOCK
        return gradient_of(rows_f, rows_d, count, sums, blocks, CORNER.place, Chip(), None, add_the_most)

    of_expert = ((count,), jnp.int32)
    return run, [((rows, EMBED), jnp.bfloat16), ((rows, WIDTH), jnp.bfloat16), of_expert, of_expert]


def some_visits(visits: int, steps: int) -> tuple[Callable[..., Any], list[tuple[tuple[int, ...], Any]]]:
    """The experts' two products, each once, with so many visits on each core, of so many steps."""
    rows = 8192 * TOP_K

    def run(sizes: jax.Array, rows_d: jax.Array, rows_f: jax.Array, w: jax.Array) -> Any:
        grid = dataclasses.replace(routed(sizes, rows), count=visits)
        kernel = partial(multiply_so_often, steps)
        return [product_of(CORNER, Chip(), own, w, grid, into, kernel) for own, into in ((rows_d, True), (rows_f, False))]

    weights = (EXPERTS // PER_BLOCK, PER_BLOCK, WIDTH, EMBED)
    return run, [((EXPERTS,), jnp.int32), *((shape, jnp.bfloat16) for shape in ((rows, EMBED), (rows, WIDTH), weights))]


def multiply_so_often(steps: int, visits: Any, rows: Any, w: Any, out: Any, *, depth: int, over: tuple[int, int]) -> None:
    """A visit of the experts' products with nothing on a condition and its steps counted."""
    first, last = visits.start_E[0], visits.end_E[0]
    step = lambda n, _: multiply(first + n * STEP, first, last, rows, w, out, depth, over)
    jax.lax.fori_loop(0, steps, step, None)


def routed(sizes: jax.Array, rows: int) -> Grid:
    return grid_of(sizes, rows, block_of(CORNER, rows, 2, Chip()))


def add_the_most(visits: Any, rows_f: Any, rows_d: Any, onto: Any, out: Any, *, most: int, embed: int) -> None:
    """A visit of the experts' gradients with nothing on a condition, which profiles leave out: as many rows as there can be."""
    v = pl.program_id(1)
    add_product(visits, v, rows_f, rows_d, onto, out, v == 0, most, rows_d.shape[1])


def one_chunk() -> tuple[Callable[..., Any], list[tuple[tuple[int, ...], Any]]]:
    """The two kernels of the head, each once."""

    def run(z: jax.Array, teacher: jax.Array, number: jax.Array) -> Any:
        return top_and_sum_by_kernel(z), kl_and_gradient_by_kernel(z, teacher, number, number, number, jnp.bfloat16)

    logits = ((TOKENS, VOCAB), jnp.float32)
    return run, [logits, logits, ((TOKENS, 1), jnp.float32)]


def head_cycles(topology: str, length: int = 8192) -> int:
    """Cycles of all of the head's kernels: a logsumexp of the teacher, and both kernels for every budget."""
    kernels = kernels_of(compiled(topology, '', 'one chunk')[1])
    of = {kernel.partition('_by_kernel')[0]: simulated(topology, '', 'one chunk', kernel) for kernel in kernels}
    count = len(HEADS_OF)
    return length // TOKENS * ((1 + count) * of['top_and_sum'] + count * of['kl_and_gradient'])


def expert_cycles(topology: str, length: int = 8192) -> float:
    """Cycles of all of the experts' kernels, with random routing: each is run twice, once for either matrix."""

    def cycles(form: str) -> int:
        return sum(simulated(topology, '', form, kernel) for kernel in kernels_of(compiled(topology, '', form)[1]))

    few, more, longer = (cycles(f'visits {visits} {steps}') for visits, steps in ((8, 2), (16, 2), (16, 6)))
    step, begin = (longer - more) / (16 * 4), 2 * few - more
    visit = (more - few) / 8 - 2 * step
    random = np.random.default_rng(0).random((length, EXPERTS))
    sizes = np.bincount(np.argpartition(random, TOP_K)[:, :TOP_K].reshape(-1), minlength=EXPERTS)
    grid = routed(jnp.asarray(sizes), length * TOP_K)
    ends, starts = np.cumsum(sizes), np.cumsum(sizes) - sizes
    parts = [
        min(end, at + grid.block) - max(start, at) // ROW_TILE * ROW_TILE
        for start, end in zip(starts, ends, strict=True)
        for at in range(start // grid.block * grid.block, end, grid.block)
    ]
    products = begin + (len(parts) * visit + sum(-(-part // STEP) for part in parts) * step) / 2
    return 2 * (products + PARTS * cycles('sums'))


def program(name: str, form: str) -> tuple[Callable[..., Any], Sequence[tuple[tuple[int, ...], Any]]]:
    if form == 'every block':
        return every_block(SMALL)
    if form == 'sums':
        return every_sum()
    if form.startswith('visits '):
        return some_visits(*map(int, form.split()[1:]))
    if form == 'one chunk':
        return one_chunk()
    piece = PIECES[name]
    return both_ways(piece.plain if form == 'xla' else piece.kernel, piece), [piece.out, *piece.args]


def compiled(topology: str, name: str, form: str) -> tuple[float, str]:
    """(GiB of temporary memory, the program as text)."""
    whole = SingleDeviceSharding(topology_devices(topology).devices[0])
    run, args = program(name, form)
    lowered = jax.jit(run).lower(*(jax.ShapeDtypeStruct(*arg, sharding=whole) for arg in args))
    one, text = compile_with_text(lowered)
    return one.memory_analysis().temp_size_in_bytes / GIB, text


def kernels_of(text: str) -> list[str]:
    return re.findall(r'%([\w.-]+) = [^\n]*custom_call_target="tpu_custom_call"', text)


def simulated(topology: str, name: str, form: str, kernel: str) -> int:
    """Cycles of one kernel by the compiler's static profile."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f'--xla_jf_dump_static_llo_profile_to={folder} --xla_jf_dump_only_matching_hlo={kernel}'
        command = [sys.executable, __file__, '--topology', topology, '--compile', name, form]
        # It may end the process after it has written the profile.
        subprocess.run(command, env={**os.environ, 'LIBTPU_INIT_ARGS': flags}, capture_output=True, check=False)
        found = [re.search(r'estimated_cycles: (\d+)', path.read_text()) for path in Path(folder).glob('*.textproto')]
    if not found or found[0] is None:
        raise SystemExit(f'the compiler wrote no profile of {kernel}')
    return int(found[0][1])


def matmul_speed(topology: str, size: int = 8192) -> float:
    """FLOPs a cycle of one large matmul."""
    whole = SingleDeviceSharding(topology_devices(topology).devices[0])
    x = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=whole)
    return 2 * size**3 / estimated_cycles(jax.jit(jnp.matmul).lower(x, x).compile().as_text())


def report(topology: str, names: Sequence[str]) -> None:
    cores, speed = CORES.get(topology.partition(':')[0], 1), matmul_speed(topology)
    print(f'\n{topology}: a large matmul runs at {speed:,.0f} FLOPs a cycle\n')
    print(
        '| piece | TFLOP needed | GB | matmul Mcycles | memory Mcycles | XLA Mcycles | GiB | kernels Mcycles | beside them | GiB '
        '| over ideal |'
    )
    print('|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|')
    of_blocks = None
    for name in names:
        piece, (plain_gib, plain) = PIECES[name], compiled(topology, name, 'xla')
        matmuls, memory = piece.flops / speed, piece.bytes / BYTES[topology.partition(':')[0]]
        begins = f'| {name} | {piece.flops / 1e12:.3f} | {piece.bytes / 1e9:.2f} | {matmuls / 1e6:.2f} | {memory / 1e6:.2f} | '
        begins += f'{estimated_cycles(plain) / 1e6:.2f} | {plain_gib:.2f} | '
        gib, text = compiled(topology, name, 'kernel')
        beside = estimated_cycles(text)
        if name.startswith('experts'):
            cycles = expert_cycles(topology)
        elif name.startswith('head'):
            cycles, beside = head_cycles(topology) + beside, 0.0
        elif piece.blocks is None:
            cycles = sum(simulated(topology, name, 'kernel', kernel) for kernel in kernels_of(text))
        else:
            of_blocks = of_blocks or block_cycles(topology, cores)
            cycles = math.fsum(each * count for each, count in zip(of_blocks, piece.blocks(cores), strict=True))
        print(f'{begins}{cycles / 1e6:.2f} | {beside / 1e6:.2f} | {gib:.2f} | {cycles / max(matmuls, memory):.2f} |', flush=True)


def block_cycles(topology: str, cores: int) -> tuple[float, float]:
    """(cycles of a block of attention in all kernels, of one that is skipped); of the largest size of block."""
    steps = 2 * HEADS * (SMALL / flash.block_size(SMALL)) ** 2 / cores
    every = compiled(topology, '', 'every block')[1]
    run = sum(simulated(topology, '', 'every block', kernel) for kernel in kernels_of(every)) / steps
    piece = PIECES['attention 8192']
    name, steps = 'attention 8192', sum(piece.blocks(cores))
    skipped = sum(simulated(topology, name, 'kernel', kernel) for kernel in kernels_of(compiled(topology, name, 'kernel')[1]))
    return run, skipped / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--topology', default='v5p:8x8x4,v6e:16x16', help='one or several, with commas')
    parser.add_argument('--pieces', default='', help='only pieces whose name begins so')
    parser.add_argument('--compile', nargs=2, metavar=('PIECE', 'FORM'), help='compile one program and stop')
    arguments = parser.parse_args()
    if arguments.compile:
        compiled(arguments.topology, *arguments.compile)
        return
    names = [name for name in PIECES if name.startswith(arguments.pieces)]
    if not names:
        raise SystemExit(f'no piece begins with {arguments.pieces!r}; there are {", ".join(PIECES)}')
    for topology in arguments.topology.split(','):
        if topology.partition(':')[0] not in BYTES:
            raise SystemExit(f'the memory of {topology} is not known; there are {", ".join(BYTES)}')
        report(topology, names)


if __name__ == '__main__':
    main()
