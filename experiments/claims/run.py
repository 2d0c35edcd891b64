"""Several claims at once: every arm that any of them has runs once, seed by seed; then the table and the pictures.

  python experiments/claims/run.py --claims 1,2,5 --seeds 0,1,2 --out runs/claims

Killed, it goes on where it stopped with the same command. `plot.py` draws what is there at any time.
"""

import argparse
import sys

import nested_or_alone
import ordering_and_widths
import summed_or_drawn
import teachers
import weighted_budgets
import width_or_depth
from lab import RUNS, run_all

from elastic_jax.errors import UserError, WorkError

CLAIMS = {
    '1': nested_or_alone,
    '2': ordering_and_widths,
    '3': width_or_depth,
    '4': weighted_budgets,
    '5': summed_or_drawn,
    '6': teachers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--claims', default='1,2,3,4,5,6', help='comma-separated (default: all)')
    parser.add_argument('--seeds', default='0,1,2', help='comma-separated (default: 0,1,2)')
    parser.add_argument('--size', default='', choices=tuple(RUNS), help="default: ''; large for a GPU, smoke for a minute")
    parser.add_argument('--out', default='runs/claims', help='parent, arms and results go here (default: runs/claims)')
    given = parser.parse_args()
    chosen = given.claims.split(',')
    unknown = [number for number in chosen if number not in CLAIMS]
    if unknown:
        sys.exit(f'there is no claim {unknown[0]}; they are {", ".join(CLAIMS)}')
    arms = {name: build for number in chosen for name, build in CLAIMS[number].ARMS.items()}
    try:
        run_all(arms, [int(seed) for seed in given.seeds.split(',')], given.size, given.out)
    except (UserError, WorkError) as error:
        sys.exit(f'run.py: {error}')


if __name__ == '__main__':
    main()
