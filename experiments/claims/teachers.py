"""Claim 6: which teacher: the frozen parent, the full budget itself, or none.

Star Elastic distils every budget, the full one too, from the frozen parent by KL. At equal tokens:
  - `nested`: KL from the frozen parent for all budgets,
  - `self`: the full budget learns by cross-entropy and the others by KL from it (as in MatFormer-like training),
  - `cross_entropy`: every budget learns from the text.

  python experiments/claims/teachers.py --seeds 0,1,2
"""

from lab import main, nested

ARMS = {'nested': nested(), 'self': nested(teacher='self'), 'cross_entropy': nested(teacher='none')}

if __name__ == '__main__':
    main(ARMS, __doc__)
