"""Compiling one program for devices that are not here, and what its compiler says of it."""

from __future__ import annotations

import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from elastic_jax.errors import WorkError
from elastic_jax.hlo import matmul_flops
from elastic_jax.hlo_cost import RELAYOUTS, Collective, collectives, estimated_cycles

# What a compiler says that ran out of memory: all that it would have used, or what it would have allocated beside the arguments.
_USED = re.compile(r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm')
_ALLOCATED = re.compile(r'HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM')
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is known of one compiled program; all of it for one device.

    Attributes:
      memory: bytes by part: those of the arguments, `activations`, `temporary` and `other`.
      total: bytes in all; where the compiler gave up for want of memory, what it would have used.
      cycles: estimated by the compiler, without kernels and collectives; None where it gave up.
      relayout_cycles: those of them that cut arrays out, or copy them into another layout.
      matmul_flops: in the program, without kernels.
      compile_seconds: tracing and compiling.
    """

    memory: dict[str, int]
    total: int
    fits: bool
    cycles: int | None
    relayout_cycles: int | None
    matmul_flops: float | None
    collectives: dict[str, Collective] | None
    compile_seconds: float


def compile_program(fn: Any, args: Sequence[Any], parts: Mapping[str, Any], capacity: int, activations: int = 0) -> Compiled:
    """Compiles jitted `fn` for abstract arguments with shardings.

    Args:
      parts: name -> the tree in `args` that it stands for (parameters, optimizer, teacher …).
      capacity: bytes of memory of one device.
      activations: bytes that are known to be kept for the backward pass; the rest of what is allocated is `temporary`.
    Raises: WorkError when the compiler fails for another reason than memory.
    """
    started = time.monotonic()
    lowered = fn.lower(*args)
    memory = {name: device_bytes(tree) for name, tree in parts.items()}
    try:
        compiled, text = compile_with_text(lowered)
    except jax.errors.JaxRuntimeError as error:
        total = bytes_wanted(str(error), sum(memory.values()))
        if total is None:
            raise WorkError(f'the TPU compiler failed: {" ".join(str(error).split())[:400]}') from error
        memory = _with_rest(memory, activations, total, total - sum(memory.values()))
        return Compiled(memory, total, False, None, None, None, None, time.monotonic() - started)
    seconds = time.monotonic() - started
    stats = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes
    total = arguments + outputs + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    memory = _with_rest(memory, activations, total, stats.temp_size_in_bytes)
    cycles = estimated_cycles(text), estimated_cycles(text, RELAYOUTS)
    return Compiled(memory, total, total <= capacity, *cycles, matmul_flops(text), collectives(text), seconds)


def compile_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The compiled program and its text. Of large ones `as_text()` fails, but the compiler's own dump can be read.

    Raises: JaxRuntimeError when it does not compile; WorkError when there is no dump.
    """
    with tempfile.TemporaryDirectory(prefix='elastic-plan-') as folder:
        compiled = lowered.compile(compiler_options={'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
        dumps = sorted(Path(folder).glob('*after_codegen.txt'), key=lambda path: path.stat().st_size)
        if not dumps:
            raise WorkError(
                'the TPU compiler wrote no text of its program; install the libtpu that belongs to this version of jax'
            )
        return compiled, dumps[-1].read_text()


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _with_rest(memory: dict[str, int], activations: int, total: int, allocated: int) -> dict[str, int]:
    kept = max(0, min(activations, allocated))
    parts = memory | {'activations': kept, 'temporary': max(0, allocated - kept)}
    return parts | {'other': max(0, total - sum(parts.values()))}


def bytes_wanted(message: str, arguments: int) -> int | None:
    """Bytes that a program would have used, from its compiler's message and its arguments' bytes; None for another failure."""
    used, allocated = _USED.search(message), _ALLOCATED.search(message)
    found = used or allocated
    if found is None:
        return None
    return int(float(found[1]) * _UNITS[found[2]]) + (0 if used else arguments)
