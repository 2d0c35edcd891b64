"""Claim 1: a nested submodel is as good as the same shape trained by itself, and all sizes cost one run.

Star Elastic (arXiv 2605.07182): submodels of one elastic run match or beat models of the same size that were compressed one by
one. At equal tokens the small budget of the nested run is set against the same shape
  - trained from scratch by cross-entropy (and, `scratch_longer`, given four times the tokens),
  - distilled from the same frozen parent from scratch,
  - pruned (the same slice of the ordered parent) and then distilled alone.
Reported: bits per byte, and after how many tokens the nested run is as good as the other at its end.

  python experiments/claims/nested_or_alone.py --seeds 0,1,2

Cost: see README.md beside this file.
"""

from lab import alone, main, nested

ARMS = {
    'nested': nested(),
    'pruned_alone': alone('small'),
    'distilled_from_scratch': alone('small', scratch=True),
    'scratch': alone('small', scratch=True, teacher='none'),
    'scratch_longer': alone('small', scratch=True, teacher='none', longer=4),
}

if __name__ == '__main__':
    main(ARMS, __doc__)
