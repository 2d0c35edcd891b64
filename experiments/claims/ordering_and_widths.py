"""Claim 2: importance finds the units to keep, and the router finds the widths.

Star Elastic and Nemotron Elastic (arXiv 2511.16664) order every axis by importance and let a router choose widths. At equal
tokens (for the router its search included):
  - `nested`: ordered by importance, the same proportion of every axis kept,
  - `random_order`: the same widths, units in random order,
  - `router`: widths by the router, one for all blocks of an axis,
  - `router_per_layer`: MLP widths chosen for every block.

  python experiments/claims/ordering_and_widths.py --seeds 0,1,2
"""

from lab import main, nested, searched

ARMS = {
    'nested': nested(),
    'random_order': nested(order='random'),
    'router': searched(),
    'router_per_layer': searched(per_layer=('mlp',)),
}

if __name__ == '__main__':
    main(ARMS, __doc__)
