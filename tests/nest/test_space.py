"""The grid between trained sizes, and the search on it: legal and nested, at the cost asked for, no better point left out."""

import itertools
import math

import pytest

from elastic_jax import cost
from elastic_jax.arch import parse_widths
from elastic_jax.errors import UserError
from elastic_jax.evaluate.summary import format_widths
from elastic_jax.layout import FLAT, Layout
from elastic_jax.nest.budgets import make_grid, point_arch
from elastic_jax.nest.search import Candidate, Pool, non_dominated, search
from elastic_jax.nest.space import at_cost, make_space, trained_line
from tests.tiny import GROUPED_MOE, HYBRID, LLAMA

BLOCKED = Layout(mlp=4, shared_width=4, experts=2, kv_heads=2)
MID = HYBRID.narrow(embed=28, mamba_heads=6, mlp=40, experts=6)
SMALL = HYBRID.narrow({'embed': 16, 'mamba_heads': 2, 'mlp': 16, 'experts': 4, 'expert_width': 8, 'layers': 4})


def lumpy(arch):
    """A score that falls with size but prefers some widths, so that the frontier is no straight line."""
    widths = [arch.embed, *(width for axis in arch.axes() for width in arch.layer_widths(axis.name).values())]
    return sum((1 + 0.3 * math.sin(5 * n + width)) / width for n, width in enumerate(widths))


@pytest.mark.parametrize('per_layer', [False, True], ids=['homogeneous', 'per layer'])
@pytest.mark.parametrize('layout', [FLAT, BLOCKED], ids=['flat', 'blocked'])
def test_every_size_that_is_scored_nests_and_respects_the_layout(layout, per_layer):
    space = make_space(HYBRID, [HYBRID, MID, SMALL], (), layout, per_layer=per_layer)
    pool = Pool(cost.parameters, lumpy)
    assert search(pool, space, 'search', 60) == 60
    for arch in [*pool.found, *map(space.arch, trained_line(space, {'mid': MID, 'small': SMALL}, cost.parameters))]:
        assert arch.nests_in(HYBRID) and SMALL.embed <= arch.embed
        layout.check(arch)
        assert HYBRID.narrow(parse_widths(format_widths(arch.widths()))) == arch
    differing = [arch for arch in pool.found if any('@' in name for name in arch.widths())]
    assert bool(differing) == per_layer


def test_the_grid_holds_what_was_trained_and_what_the_router_could_choose():
    run_grid = make_grid(HYBRID, {'mlp': (1.0, 0.25), 'shared_width': (24, 20)})
    space = make_space(HYBRID, [HYBRID, MID, SMALL], run_grid)
    widths = {choices.axis: choices.widths for choices in space.grid}
    assert set(widths) == {'embed', 'mamba_heads', 'mlp', 'experts', 'expert_width', 'layers', 'shared_width'}
    assert {12, 16, 40, 48} <= set(widths['mlp']) and {24, 20} <= set(widths['shared_width'])
    assert all(width % 2 == 0 for width in widths['mamba_heads']), 'two groups'
    for arch in (HYBRID, MID, SMALL):
        assert space.arch(space.flat_of(arch)) == arch
    assert space.flat_of(HYBRID.narrow(mlp=47)) is None
    only = make_space(HYBRID, [HYBRID], axes=('mlp',))
    assert [choices.axis for choices in only.grid] == ['mlp'] and min(only.grid[0].widths) == 24
    assert all(width % 4 == 0 for choices in make_space(GROUPED_MOE, [GROUPED_MOE]).grid for width in choices.widths
               if choices.axis == 'experts')  # fmt: skip
    assert 'layers' not in {choices.axis for choices in make_space(LLAMA, [LLAMA]).grid}
    with pytest.raises(UserError, match="unknown axis 'mpl'; did you mean 'mlp'"):
        make_space(HYBRID, [HYBRID], axes=('mpl',))


@pytest.mark.parametrize('measure', [cost.parameters, lambda arch: cost.flops_per_token(arch, 256)], ids=['parameters', 'flops'])
def test_interpolation_walks_nested_sizes_and_meets_any_cost_in_between(measure):
    space = make_space(HYBRID, [HYBRID, MID, SMALL])
    line = trained_line(space, {'full': HYBRID, 'mid': MID, 'small': SMALL}, measure)
    archs = list(map(space.arch, line))
    assert archs[0] == HYBRID and MID in archs and archs[-1] == SMALL
    assert all(small.nests_in(large) and small != large for large, small in itertools.pairwise(archs))
    low, high = measure(SMALL), measure(HYBRID)
    for share in (0.05, 0.3, 0.5, 0.77, 0.95):
        target = low + share * (high - low)
        arch, miss = at_cost(space, line, target, measure)
        assert miss == pytest.approx(measure(arch) / target - 1) and abs(miss) <= 0.02
    _, miss = at_cost(space, line, low / 2, measure)
    assert miss > 0.5, 'below the grid the miss is said, not hidden'


def test_the_frontier_is_what_no_other_dominates():
    pairs = [(3, 1.0), (1, 3.0), (2, 2.0), (2, 2.5), (4, 1.0), (5, 0.5), (1, 3.0), (6, float('inf')), (0.5, 9.0)]
    candidates = [Candidate(HYBRID, 'x', *pair, name=str(n)) for n, pair in enumerate(pairs)]
    beats = lambda a, b: a.cost <= b.cost and a.score <= b.score and (a.cost, a.score) != (b.cost, b.score)
    brute = [one for one in candidates if not any(beats(other, one) for other in candidates)]
    assert sorted(one.name for one in non_dominated(candidates)) == sorted(one.name for one in brute) and len(brute) == 6


def test_no_size_of_a_small_grid_is_better_than_what_is_found():
    space = make_space(HYBRID, [HYBRID], axes=('embed', 'mlp', 'expert_width'), resolution=3)
    every = [HYBRID.narrow(embed=e, mlp=m, expert_width=w)
             for e, m, w in itertools.product(*(choices.widths for choices in space.grid))]  # fmt: skip
    scored = [(cost.parameters(arch), lumpy(arch)) for arch in every]
    assert len(every) == space.size == 64
    best = {one for one in scored if not any(a[0] <= one[0] and a[1] <= one[1] and a != one for a in scored)}
    whole = Pool(cost.parameters, lumpy)
    assert search(whole, space, 'search', 64) == 64
    assert {(one.cost, one.score) for one in whole.frontier()} == best
    short = Pool(cost.parameters, lumpy)
    short.add(HYBRID, 'full')
    assert search(short, space, 'search', 40) == 40 and len(short.found) == 41
    found = {(one.cost, one.score) for one in short.frontier()}
    assert len(found & best) >= 0.7 * len(best)


def test_the_same_seed_takes_the_same_way_and_a_bound_holds():
    space = make_space(HYBRID, [HYBRID, MID, SMALL], per_layer=True)
    ways = []
    for seed in (0, 0, 1):
        pool = Pool(cost.parameters, lumpy)
        pool.add(MID, 'trained', 'mid')
        search(pool, space, 'search', 25, seed, least=cost.parameters(SMALL))
        ways.append(list(pool.found))
    assert ways[0] == ways[1] != ways[2]
    assert all(cost.parameters(arch) >= cost.parameters(SMALL) for arch in ways[0])


@pytest.mark.parametrize('per_layer', [False, True], ids=['homogeneous', 'per layer'])
def test_a_parent_whose_blocks_differ_has_a_grid_too(per_layer):
    """A size that a router found per layer may be the next run's parent: a choice narrows only the blocks that are wider."""
    parent = LLAMA.narrow({'mlp@3': 32})
    grid = make_grid(parent, {'mlp': (1.0, 40, 24)}, ('mlp',) if per_layer else ())
    rows = grid[0].rows
    archs = [point_arch(parent, grid, {'mlp': (index,) * rows}) for index in range(3)]
    assert [arch.layer_widths('mlp') for arch in archs] == [{1: 48, 3: 32}, {1: 40, 3: 32}, {1: 24, 3: 24}]
    space = make_space(parent, [parent, archs[2]], grid, per_layer=per_layer)
    assert all(arch.nests_in(parent) for arch in map(space.arch, space.points()))
    with pytest.raises(UserError, match=r'mlp@1=50 does not nest: the parent has 48'):
        make_grid(parent, {'mlp': (50,)})
