"""What a step of three budgets costs: lockstep static slices against independent models, masks at full width, and full alone.

  python experiments/bench/step.py [--rounds 7] [--json]

One run, interleaved, medians. Budgets keep 1, 0.75 and 0.5 of every width of one hybrid parent. Each variant distils from the
frozen parent and updates with AdamW:
  lockstep      one jitted step, static slices, the teacher once
  independents  three models of those shapes with parameters of their own, each with its own teacher pass, their times summed
  masks         one jitted step, three 0/1 masks at full width, the teacher once
  full          the full budget alone
Targets: lockstep at most 0.90 of the independents; at most 1.10 of the closed-form FLOP ratio against masks; matmul FLOPs of the
compiled lockstep step within 3 % of the closed form.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE
from elastic_jax.cost import training_flops_per_token
from elastic_jax.hlo import matmul_flops
from elastic_jax.model.context import context_for
from elastic_jax.model.decoder import hidden_states, unembedding
from elastic_jax.model.losses import Students, kl_losses
from elastic_jax.model.params import init_params
from elastic_jax.nest.masks import hard_masks, mask_params, softs
from elastic_jax.nest.slice import slice_params
from elastic_jax.train.state import guarded_update, new_state
from elastic_jax.train.step import StepConfig, make_elastic_step

BATCH, CONTEXT = 4, 256
OPTIMIZER = optax.adamw(1e-4)
PARENT = Arch.from_pattern(
    'ME*-ME*-',
    vocab=1024,
    embed=256,
    mamba=Mamba(heads=16, head_dim=32, groups=4, state=32, chunk=64),
    attention=Attention(kv_heads=2, query_heads=4, head_dim=32),
    mlp=MLP(width=1024),
    moe=MoE(experts=8, expert_width=512, top_k=2, shared_width=512),
)


def share(fraction: float) -> Arch:
    """The budget with a share of every width (Mamba's channels through its heads)."""
    return PARENT.narrow(
        embed=int(256 * fraction),
        mamba_heads=int(16 * fraction),
        query_heads=max(1, round(4 * fraction)),
        mlp=int(1024 * fraction),
        expert_width=int(512 * fraction),
        shared_width=int(512 * fraction),
    )


BUDGETS = [('full', PARENT), ('mid', share(0.75)), ('small', share(0.5))]


def make_batch() -> dict[str, jax.Array]:
    tokens, targets = jax.random.randint(jax.random.key(1), (2, BATCH, CONTEXT), 0, PARENT.vocab)
    ones = jnp.ones((BATCH, CONTEXT), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(CONTEXT), (BATCH, CONTEXT))
    mask = jnp.ones((BATCH, CONTEXT))
    return {'tokens': tokens, 'targets': targets, 'segment_ids': ones, 'positions': positions, 'loss_mask': mask}


def independent_step(arch: Arch) -> Any:
    """One model of its own, with its own teacher pass."""

    def step(state: Any, teacher: Any, batch: Any) -> Any:
        context = context_for(batch['tokens'], batch['segment_ids'], batch['positions'])

        def loss_fn(params: Any) -> jax.Array:
            target, _ = hidden_states(teacher, batch['tokens'], PARENT, context)
            own, _ = hidden_states(params, batch['tokens'], arch, context)
            students, teacher_head = [Students((own,), unembedding(params))], (target, unembedding(teacher))
            return kl_losses(students, [1.0], teacher_head, batch['loss_mask'], batch['loss_mask'].sum())[0]

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return guarded_update(state, (grads, {}), loss, OPTIMIZER)

    return jax.jit(step, donate_argnums=0)


def masked_step() -> Any:
    """Three budgets as masks at full width; the masks are inputs, as a router's would be."""

    def step(state: Any, teacher: Any, batch: Any, masks: Any) -> Any:
        context = context_for(batch['tokens'], batch['segment_ids'], batch['positions'])

        def loss_fn(params: Any) -> jax.Array:
            target, _ = hidden_states(teacher, batch['tokens'], PARENT, context)
            students = []
            for own in masks:
                masked = mask_params(params, PARENT, own)
                hidden, _ = hidden_states(masked, batch['tokens'], PARENT, context, softs(PARENT, own))
                students.append(Students((hidden,), unembedding(masked)))
            weights, teacher_head = [1 / len(students)] * len(students), (target, unembedding(teacher))
            return kl_losses(students, weights, teacher_head, batch['loss_mask'], batch['loss_mask'].sum())[0]

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return guarded_update(state, (grads, {}), loss, OPTIMIZER)

    return jax.jit(step, donate_argnums=0)


class Variant:
    """A compiled step with its own state, timed call by call; `made`: processor seconds of tracing, lowering and compiling."""

    def __init__(self, step: Any, params: Any, *inputs: Any):
        self.state, self.inputs = new_state(jax.tree.map(jnp.copy, params), OPTIMIZER), inputs
        marks = [time.process_time()]
        traced = step.trace(self.state, *inputs)
        marks.append(time.process_time())
        lowered = traced.lower()
        marks.append(time.process_time())
        self.program = lowered.compile()
        marks.append(time.process_time())
        self.made = [after - before for before, after in itertools.pairwise(marks)]
        self.times: list[float] = []
        self.call()

    def call(self) -> float:
        begun = time.perf_counter()
        self.state, metrics = self.program(self.state, *self.inputs)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--json', action='store_true')
    arguments = parser.parse_args()
    params, teacher, batch = init_params(jax.random.key(0), PARENT), init_params(jax.random.key(2), PARENT), make_batch()
    lockstep = make_elastic_step(PARENT, BUDGETS, (1 / 3,) * 3, OPTIMIZER, StepConfig())
    full_only = make_elastic_step(PARENT, BUDGETS[:1], (1.0,), OPTIMIZER, StepConfig())
    masks = tuple(hard_masks(PARENT, arch) for _, arch in BUDGETS)
    variants = {
        'lockstep': Variant(lockstep, params, teacher, batch),
        'masks': Variant(masked_step(), params, teacher, batch, masks),
        'full': Variant(full_only, params, teacher, batch),
    }
    for name, arch in BUDGETS:
        own = slice_params(params, PARENT, arch)
        variants[f'independent {name}'] = Variant(independent_step(arch), own, teacher, batch)
    for _ in range(arguments.rounds):
        for variant in variants.values():
            variant.times.append(variant.call())

    seconds = {name: statistics.median(variant.times) for name, variant in variants.items()}
    programs = {name: variant.program for name, variant in variants.items()}
    flops = {name: matmul_flops(program.as_text()) for name, program in programs.items()}
    memory = {name: program.memory_analysis().temp_size_in_bytes / 1e6 for name, program in programs.items()}
    alone = [name for name in variants if name.startswith('independent')]
    for table, combine in ((seconds, sum), (flops, sum), (memory, max)):
        table['independents'] = combine(table[name] for name in alone)
    archs = [arch for _, arch in BUDGETS]
    closed = training_flops_per_token(PARENT, archs, CONTEXT, executed_batch=BATCH) * BATCH * CONTEXT
    masked = training_flops_per_token(PARENT, [PARENT] * 3, CONTEXT, executed_batch=BATCH) * BATCH * CONTEXT
    figures = {
        'lockstep / independents, time': seconds['lockstep'] / seconds['independents'],
        'lockstep / masks, time': seconds['lockstep'] / seconds['masks'],
        'lockstep / masks, closed-form FLOPs': closed / masked,
        'time ratio / FLOP ratio against masks': seconds['lockstep'] / seconds['masks'] / (closed / masked),
        'lockstep matmul FLOPs / closed form': flops['lockstep'] / closed,
        'lockstep / full alone, time': seconds['lockstep'] / seconds['full'],
    }
    if arguments.json:
        found = {'seconds': seconds, 'flops': flops, 'temporary_mb': memory, 'ratios': figures, 'made': variants['lockstep'].made}
        print(json.dumps(found))
        return
    print(f'{"":14s}{"ms/step":>10s}{"GFLOP":>10s}{"temp MB":>10s}')
    for name in ('lockstep', 'independents', 'masks', 'full'):
        print(f'{name:14s}{1e3 * seconds[name]:10.0f}{flops[name] / 1e9:10.1f}{memory[name]:10.0f}')
    for name, value in figures.items():
        print(f'{name:40s}{value:8.3f}')
    traced, lowered, compiled = variants['lockstep'].made
    print(f'lockstep, processor seconds: traced in {traced:.1f}, lowered in {lowered:.1f}, compiled in {compiled:.1f}')


if __name__ == '__main__':
    main()
