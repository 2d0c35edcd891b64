"""Claim 4: drawing the full budget more often in the last stage helps it, at little cost to the others.

Star Elastic (arXiv 2605.07182) draws one budget per step: uniformly at first, then full, mid and small with probabilities 0.5,
0.3 and 0.2, and reports +3.5 points on AIME25 for the full model. Both arms draw uniformly for half of the tokens; in the second
half
  - `drawn_uniform` goes on,
  - `drawn_weighted` draws 0.5 / 0.3 / 0.2.

  python experiments/claims/weighted_budgets.py --seeds 0,1,2
"""

from lab import Build, Setting, main
from ml_collections import ConfigDict

from elastic_jax.train.config import stage


def drawn(last: dict[str, float]) -> Build:
    def build(setting: Setting, config: ConfigDict) -> None:
        shape = (setting.steps // 2, setting.context, setting.batch_size)
        config.stages.elastic = stage('elastic', *shape, mode='sampled')
        config.stages.last = stage('elastic', *shape, mode='sampled', probabilities=last)
        config.curriculum = ('elastic', 'last')

    return build


ARMS = {'drawn_uniform': drawn({}), 'drawn_weighted': drawn({'full': 0.5, 'mid': 0.3, 'small': 0.2})}

if __name__ == '__main__':
    main(ARMS, __doc__)
