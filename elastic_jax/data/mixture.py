"""Which source a row comes from: weights become a period of rows, so that any row is found by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 4096


class Mixture:
    """Rows of several endless sources in fixed shares.

    A period of P rows holds counts[s] rows of source s, spread evenly: up to any row, each of N sources has had its share of the
    rows to within (N + 1) / 2. The period repeats without end.
    """

    def __init__(self, counts: Sequence[int]):
        self.counts = np.asarray(counts, np.int64)
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
        source = np.repeat(np.arange(len(counts)), self.counts)
        self.order = source[np.argsort(places, kind='stable')]
        self.rank = np.empty(len(self.order), np.int64)
        for s in range(len(counts)):
            self.rank[self.order == s] = np.arange(self.counts[s])

    @property
    def period(self) -> int:
        return len(self.order)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, row of that source) of rows of the mixture, [n] each."""
        periods, places = np.divmod(rows, self.period)
        source = self.order[places]
        return source, periods * self.counts[source] + self.rank[places]


def period_counts(weights: Sequence[float]) -> list[int]:
    """Rows of each source in a period: the smallest period that holds the shares exactly, else one of LONGEST_PERIOD rows.

    Shares are read as written (0.7 is 7/10). In the longest period every source with a weight has at least one row.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= LONGEST_PERIOD:
        return [int(share * period) for share in shares]
    counts = [max(1, math.floor(share * LONGEST_PERIOD)) if share else 0 for share in shares]
    missing = LONGEST_PERIOD - sum(counts)
    by_remainder = sorted(range(len(shares)), key=lambda s: counts[s] - shares[s] * LONGEST_PERIOD)
    for s in by_remainder[: max(missing, 0)]:
        counts[s] += 1
    return counts
