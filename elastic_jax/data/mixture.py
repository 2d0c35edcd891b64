"""Which source a row comes from: weights become a period of rows, so that any row is found by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

PERIOD, LONGEST_PERIOD = 4096, 2**20
OFF = Fraction(1, 50)  # of its share, which a source may have more or less


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
    """Rows of each source in a period: the smallest period that holds the shares exactly, else one that holds them nearly.

    Shares are read as written (0.7 is 7/10). A period has no more than PERIOD rows unless some share would be off by more than
    OFF, as that of a very small source is, and never more than LONGEST_PERIOD. Every source with a weight has at least one row.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    exactly = math.lcm(*(share.denominator for share in shares))
    for period in (PERIOD, LONGEST_PERIOD):
        if exactly <= period:
            return [int(share * exactly) for share in shares]
        counts = _nearest(shares, period)
        if all(abs(count - share * period) <= OFF * share * period for count, share in zip(counts, shares, strict=True)):
            break
    return counts


def _nearest(shares: Sequence[Fraction], period: int) -> list[int]:
    counts = [max(1, math.floor(share * period)) if share else 0 for share in shares]
    missing = period - sum(counts)
    by_remainder = sorted(range(len(shares)), key=lambda s: counts[s] - shares[s] * period)
    for s in by_remainder[: max(missing, 0)]:
        counts[s] += 1
    return counts
