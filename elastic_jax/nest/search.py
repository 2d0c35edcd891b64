"""The search for sizes that no other beats: a pool of scored candidates, and a short evolutionary search over a grid."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from elastic_jax.arch import Arch
from elastic_jax.nest.space import CostOf, Flat, Space

Score = Callable[[Arch], float]
PATIENCE = 200  # children in a row that were known already, after which the search ends


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One size with its cost and its held-out score, both of which are better when lower.

    Attributes:
      origin: how it was found. name: of a trained budget.
      target: the cost that it was to have, if any.
    """

    arch: Arch
    origin: str
    cost: float
    score: float
    name: str = ''
    target: float | None = None


def non_dominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other matches in both cost and score and beats in one, cheapest first."""
    best, kept = float('inf'), []
    for one in sorted(candidates, key=lambda one: (one.cost, one.score)):
        same = kept and (one.cost, one.score) == (kept[-1].cost, kept[-1].score)
        if one.score < best or same:
            best = one.score
            kept.append(one)
    return kept


class Pool:
    """The candidates so far, each Arch scored once."""

    def __init__(self, cost: CostOf, score: Score):
        self._cost, self._score, self._costs = cost, score, {}
        self.found: dict[Arch, Candidate] = {}

    def cost(self, arch: Arch) -> float:
        if arch not in self._costs:
            self._costs[arch] = float(self._cost(arch))
        return self._costs[arch]

    def add(self, arch: Arch, origin: str, name: str = '', target: float | None = None) -> bool:
        """Scores a candidate; False when it is there already."""
        if arch in self.found:
            return False
        self.found[arch] = Candidate(arch, origin, self.cost(arch), self._score(arch), name, target)
        return True

    def frontier(self) -> list[Candidate]:
        return non_dominated(list(self.found.values()))


def search(pool: Pool, space: Space, origin: str, evaluations: int, seed: int = 0, least: float = 0.0) -> int:
    """Scores up to `evaluations` more sizes of the grid that cost at least `least`; returns how many there were to score.

    A grid with no more sizes than that is scored whole. Otherwise children of the frontier, as far as it lies on the grid, are
    scored: one or two rows moved by a choice, or rows taken from either of two. The same seed takes the same way.
    """
    allowed = lambda arch: pool.cost(arch) >= least * (1 - 1e-9)
    if space.size <= 50 * evaluations:  # else listing them takes longer than it can save
        rest = [arch for arch in map(space.arch, space.points()) if arch not in pool.found and allowed(arch)]
        rest = list(dict.fromkeys(rest))
        if len(rest) <= evaluations:
            return sum(pool.add(arch, origin) for arch in rest)
    rng, done, fruitless = random.Random(seed), 0, 0
    points: dict[Arch, Flat | None] = {}
    while done < evaluations and fruitless < PATIENCE:
        frontier = [one.arch for one in pool.frontier()]
        points |= {arch: space.flat_of(arch) for arch in frontier if arch not in points}
        parents = [flat for flat in (points[arch] for arch in frontier) if flat is not None]
        arch = space.arch(_child(rng, parents or [(0,) * len(space.counts)], space))
        fruitless += 1
        if arch not in pool.found and allowed(arch):
            pool.add(arch, origin)
            done, fruitless = done + 1, 0
    return done


def _child(rng: random.Random, parents: Sequence[Flat], space: Space) -> Flat:
    """A point near the parents; moves may lead back, which the caller sees."""
    place = rng.randrange(len(parents))
    child = parents[place]
    if len(parents) > 1 and rng.random() < 0.25:
        # Neighbours on the frontier cost much the same: what one does better may be put into the other.
        other = parents[place + 1 if place + 1 < len(parents) else place - 1]
        child = tuple(rng.choice(pair) for pair in zip(child, other, strict=True))
    for _ in range(rng.choice((1, 2, 2))):
        moves = space.moves(child)
        child = rng.choice(moves) if moves else child
    return child
