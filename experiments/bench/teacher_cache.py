"""Training from cached top-k logits against training from the parent itself: loss, bytes per token, time of a step.

  python experiments/bench/teacher_cache.py --checkpoint runs/claims/default/parent

The teacher is a trained parent; the budgets are its own uniform slices, of which the smaller are far from it, as they are when
elastic training begins. Prints, for every k: KL from the top k and the tail over the full KL, by budget; bytes per token of the
cache, and of the log-probabilities of the whole vocabulary in float16; median seconds of a step, interleaved rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import elastic_jax
from elastic_jax.cost import flops_per_token, training_flops_per_token
from elastic_jax.data.pipeline import default_data_config, make_iterator
from elastic_jax.data.teacher import TeacherSpec
from elastic_jax.model.losses import kl_losses, top_k_kl_losses
from elastic_jax.train.config import default_config
from elastic_jax.train.lockstep import lockstep
from elastic_jax.train.programs import BATCH_KEYS
from elastic_jax.train.state import make_optimizer, new_state
from elastic_jax.train.step import StepConfig, make_elastic_step, step_context, teacher_head
from elastic_jax.train.teacher_cache import make_teacher_program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--checkpoint', required=True)
    parser.add_argument('--rounds', type=int, default=7)
    given = parser.parse_args()
    model = elastic_jax.open_checkpoint(given.checkpoint).load('full')
    parent, params = model.arch, model.params
    shrink = lambda ratio: parent.narrow(embed=int(parent.embed * ratio), mlp=int(parent.widths()['mlp'] * ratio))
    budgets = [('full', parent), ('mid', shrink(0.75)), ('small', shrink(0.5))]
    stream = make_iterator(default_data_config(), split='heldout', batch_size=8, context=256, seed=0)
    batches = [{key: jnp.asarray(batch[key]) for key in BATCH_KEYS} for batch, _ in zip(stream, range(4), strict=False)]
    config, optimizer = StepConfig(), make_optimizer(default_config().optimizer, 100)

    @jax.jit
    def losses(batch, ids, log_p):
        context = step_context(batch, parent, config)
        students, _ = lockstep(params, batch['tokens'], parent, [arch for _, arch in budgets], context, config.stack(parent))
        args, scored = ([students], [1.0] * len(budgets)), (batch['loss_mask'], batch['loss_mask'].sum())
        _, full = kl_losses(*args, teacher_head(params, batch, parent, context, config), *scored)
        return full, top_k_kl_losses(*args, ids, log_p, *scored)[1]

    print(f'teacher {parent.pattern}, vocabulary {parent.vocab}; tokens scored {sum(int(b["loss_mask"].sum()) for b in batches)}')
    print('| k | tail mass | KL / full KL: mid | small | bytes per token |')
    print('|---:|---:|---:|---:|---:|')
    for k in (1, 4, 8, 16, 32, 64, parent.vocab):
        program = make_teacher_program(parent, k, config)
        found, tails = [], []
        for batch in batches:
            ids, log_p = program(params, batch)
            found.append(losses(batch, ids, log_p))
            tails.append(np.exp(np.asarray(log_p, np.float32)[..., -1]).mean())
        full, coarse = (np.mean([np.asarray(pair[i]) for pair in found], axis=0) for i in range(2))
        ratios = ' | '.join(f'{coarse[n] / full[n]:.4f}' for n in (1, 2))
        size = TeacherSpec({}, '', parent.vocab, k, True, 256).bytes_per_token
        print(f'| {k} | {np.mean(tails):.4f} | {ratios} | {size} |')
    print(f'whole vocabulary in float16: {2 * parent.vocab} bytes per token\n')

    steps, states, extra = {}, {}, {}
    for teacher in ('frozen', 'cached'):
        steps[teacher] = make_elastic_step(parent, budgets, (1 / 3,) * 3, optimizer, config, teacher)
        states[teacher] = new_state(jax.tree.map(jnp.copy, params), optimizer)
    ids, log_p = make_teacher_program(parent, 32, config)(params, batches[0])
    extra = {'frozen': {}, 'cached': {'teacher_ids': ids, 'teacher_log_p': log_p}}
    times: dict[str, list[float]] = {'frozen': [], 'cached': []}
    for _ in range(given.rounds + 1):
        for teacher, step in steps.items():
            begun = time.perf_counter()
            own = params if teacher == 'frozen' else {}
            states[teacher], _ = step(states[teacher], own, batches[0] | extra[teacher])
            jax.block_until_ready(states[teacher].step)
            times[teacher].append(time.perf_counter() - begun)
    frozen, cached = (statistics.median(times[name][1:]) for name in ('frozen', 'cached'))
    archs = [arch for _, arch in budgets]
    flops = 1 - flops_per_token(parent, 256) / training_flops_per_token(parent, archs, 256)
    ratio = f'ratio {cached / frozen:.3f}, by FLOPs {flops:.3f}'
    print(f'step: frozen {1e3 * frozen:.0f} ms, cached (k = 32) {1e3 * cached:.0f} ms: {ratio}')
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f'not in memory: {size / 1e6:.2f} MB of teacher parameters')


if __name__ == '__main__':
    main()
