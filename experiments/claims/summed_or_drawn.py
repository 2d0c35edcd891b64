"""Claim 5: several budgets summed in every step against one budget drawn per step, at equal compute.

The papers draw one budget per micro-batch; this project sums the budgets' losses on static slices in one step, which share the
teacher's pass. A drawn step is cheaper, so it gets as many more steps (and tokens) as the same FLOPs buy:
  - `nested`: all three budgets in every step,
  - `drawn`: one of them per step, uniformly.

  python experiments/claims/summed_or_drawn.py --seeds 0,1,2
"""

from lab import Setting, main, nested
from ml_collections import ConfigDict

from elastic_jax.train.flops import stage_flops
from elastic_jax.train.setup import make_plan


def drawn(setting: Setting, config: ConfigDict) -> None:
    flops = lambda plan: stage_flops(plan, plan.stages[0])
    summed = flops(make_plan(config))  # before the change: a plan looks at the config that it was made of
    config.stages.elastic.mode = 'sampled'
    more = summed / flops(make_plan(config))
    config.stages.elastic.steps = round(more * setting.steps)
    config.eval.every = round(more * config.eval.every)


ARMS = {'nested': nested(), 'drawn': drawn}

if __name__ == '__main__':
    main(ARMS, __doc__)
