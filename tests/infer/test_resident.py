"""Every size from one set of parameters: what is kept, what it costs, what is let go of, and that none of it shows in text."""

import jax
import numpy as np
import pytest

from elastic_jax.errors import UserError
from elastic_jax.infer import sizes as sizes_module
from elastic_jax.infer.budget_control import Control
from elastic_jax.infer.generate import generate
from elastic_jax.infer.resident import Resident
from elastic_jax.infer.sampling import Sampling
from elastic_jax.infer.sizes import Sizes
from elastic_jax.nest.slice import slice_params
from tests.infer.tiny import HYBRID, LETTERS, budgets_of, random_weights

BUDGETS = budgets_of(HYBRID)
PARENT = random_weights(HYBRID)
WARM = Sampling(1.0)


def resident(limit=None):
    return Resident(PARENT.params, HYBRID, limit_bytes=limit)


def slice_bytes(arch):
    """Bytes of the leaves of a slice that are narrower than the parent's."""
    cut = jax.tree.leaves_with_path(slice_params(PARENT.params, HYBRID, arch))
    whole = dict(jax.tree.leaves_with_path(PARENT.params))
    return sum(leaf.nbytes for path, leaf in cut if leaf.shape != whole[path].shape)


@pytest.mark.parametrize('budget', BUDGETS)
@pytest.mark.parametrize('limit', [None, 0])
def test_a_size_writes_what_its_own_slice_writes(budget, limit):
    """Kept, or cut inside the program where the limit leaves no room."""
    weights = resident(limit).weights(BUDGETS[budget])
    own = random_weights(HYBRID, BUDGETS[budget])
    written = [generate(model, LETTERS, ['abcd'], 12, WARM, seeds=[3])[0].text for model in (weights, own)]
    assert written[0] == written[1]


def test_leaves_of_full_width_are_the_resident_ones():
    sizes, arch = resident(), HYBRID.narrow(mlp=16)
    assert sizes.weights(HYBRID).params is PARENT.params
    cut = sizes.weights(arch).params
    shared = [
        path for path, leaf in jax.tree.leaves_with_path(cut) if leaf is dict(jax.tree.leaves_with_path(PARENT.params))[path]
    ]
    assert len(shared) == len(jax.tree.leaves(cut)) - 2
    narrow = sum(cut['layer_003'][name].nbytes for name in ('up', 'down'))
    assert sizes.slice_bytes(arch) == sizes.report()['slices_bytes'] == narrow == slice_bytes(arch)


def test_two_sizes_share_the_leaves_that_they_have_in_common():
    sizes, one, other = resident(), HYBRID.narrow(mlp=16, expert_width=4), HYBRID.narrow(mlp=16)
    first, second = sizes.weights(one).params, sizes.weights(other).params
    assert first['layer_003']['up'] is second['layer_003']['up']
    assert sizes.report()['slices_bytes'] == slice_bytes(one)


def test_the_least_recently_used_slice_makes_room_and_the_limit_holds():
    mid, small, other = BUDGETS['mid'], BUDGETS['small'], HYBRID.narrow(embed=13)
    limit = slice_bytes(mid) + max(slice_bytes(small), slice_bytes(other))
    sizes = resident(limit)
    kept = lambda arch: sizes.weights(arch).params
    mid_params, small_params = kept(mid), kept(small)
    assert kept(mid) is mid_params and sizes.report()['evictions'] == 0
    kept(other)  # small was used least recently
    report = sizes.report()
    assert report['slices'] == 2 and report['evictions'] == 1 and report['slices_bytes'] <= limit == report['limit_bytes']
    assert kept(mid) is mid_params and kept(small) is not small_params
    np.testing.assert_array_equal(kept(small)['layer_003']['up'], small_params['layer_003']['up'])
    assert report['resident_bytes'] == sum(leaf.nbytes for leaf in jax.tree.leaves(PARENT.params))


def test_a_slice_too_large_for_the_limit_is_not_kept():
    sizes = resident(slice_bytes(BUDGETS['small']))
    sizes.weights(BUDGETS['small'])
    weights = sizes.weights(BUDGETS['mid'])
    assert weights.params is PARENT.params and weights.stored == HYBRID and weights.arch == BUDGETS['mid']
    assert sizes.report()['slices'] == 1 and sizes.report()['evictions'] == 0


@pytest.mark.parametrize('verb', ['think', 'speculate'])
def test_two_sizes_that_run_together_keep_to_the_limit_and_are_cut_once(monkeypatch, verb):
    """Each fits, both do not: the second is cut within its programs, whatever was kept before."""
    ran, program = [], {'think': 'think_then_answer', 'speculate': 'generate_speculative'}[verb]
    monkeypatch.setattr(sizes_module, program, lambda one, other, *_, **__: ran.append((one, other)))
    kept = resident(max(slice_bytes(BUDGETS[name]) for name in ('mid', 'small')))
    sizes = Sizes(kept, BUDGETS, LETTERS)
    sizes.weights('small')
    for _ in range(3):
        getattr(sizes, verb)(['a'], 'mid', 'small', *[Control()] * (verb == 'think'))
    for mid, small in ran:
        assert mid.stored == BUDGETS['mid'] and small.params is PARENT.params and small.arch == BUDGETS['small']
    assert len(ran) == 3 and kept.report()['evictions'] == 1


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match='embed=32 does not nest'):
        resident().weights(random_weights(HYBRID).arch.__class__(HYBRID.vocab, 32, HYBRID.mixers))
    with pytest.raises(UserError, match='give 0 or more'):
        resident(-1)
