"""An Arch narrows, nests and round-trips; what does not fit is refused in one sentence."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax.arch import MLP, Arch, Attention, Mamba, MoE, Rope, parse_widths
from elastic_jax.errors import UserError
from tests.strategies import narrowings
from tests.tiny import FAMILIES, GROUPED_MOE, HYBRID, LLAMA, QWEN_MOE

families = st.sampled_from(list(FAMILIES.values()))


def test_pattern_and_units():
    assert HYBRID.pattern == 'ME*-E'
    assert (HYBRID.units, HYBRID.layers, LLAMA.units) == (5, 5, 2)
    assert LLAMA.narrow(layers=1).pattern == '*-..'
    assert [axis.name for axis in LLAMA.axes()] == ['embed', 'layers', 'query_heads', 'kv_heads', 'mlp']
    assert 'shared_width' not in {axis.name for axis in QWEN_MOE.axes()}


def test_narrow_changes_what_is_named_and_nothing_else():
    child = HYBRID.narrow(embed=24, mlp=32, mamba_heads=4, kv_heads=2)
    mamba, moe, attention, mlp, last = child.mixers
    assert child.embed == 24
    assert mamba == dataclasses.replace(HYBRID.mixers[0], heads=4)
    assert attention == dataclasses.replace(HYBRID.mixers[2], kv_heads=2)
    assert mlp == dataclasses.replace(HYBRID.mixers[3], width=32)
    assert (moe, last) == (HYBRID.mixers[1], HYBRID.mixers[4])


def test_a_blocks_own_width_wins_over_the_axis_in_any_order():
    for widths in ({'experts@1': 6, 'experts': 4}, {'experts': 4, 'experts@1': 6}):
        child = HYBRID.narrow(widths)
        assert child.layer_widths('experts') == {1: 6, 4: 4}
    assert HYBRID.narrow({'experts@1': 6}).layer_widths('experts') == {1: 6, 4: 8}


def test_layers_keeps_the_first_of_the_ranking():
    ranked = dataclasses.replace(HYBRID, ranking=(3, 0, 4, 2, 1))
    assert ranked.narrow(layers=3).pattern == 'M..-E'
    assert ranked.narrow({'layers': 2, 'experts@4': 4}).pattern == 'M..-.'
    # A submodel is narrowed further by the same ranking, over the units that it still has.
    assert ranked.narrow(layers=3).narrow(layers=1).pattern == '...-.'
    assert ranked.narrow(layers=3).layers == 3
    assert dataclasses.replace(LLAMA, ranking=(1, 0)).narrow(layers=1).pattern == '..*-'


def test_ranking_is_no_part_of_what_a_model_is():
    ranked = dataclasses.replace(HYBRID, ranking=(3, 0, 4, 2, 1))
    assert ranked == HYBRID
    assert hash(ranked) == hash(HYBRID)


@given(families.flatmap(lambda arch: st.tuples(st.just(arch), narrowings(arch))))
def test_widths_of_a_submodel_give_it_back(case):
    arch, widths = case
    child = arch.narrow(widths)
    assert arch.narrow(child.widths()) == child
    assert child.nests_in(arch)
    assert child == arch or not arch.nests_in(child)


@given(families.flatmap(lambda arch: st.tuples(st.just(arch), narrowings(arch))))
def test_json_round_trip(case):
    arch, widths = case
    child = dataclasses.replace(arch, ranking=tuple(reversed(range(arch.units)))).narrow(widths)
    found = Arch.from_json(json.loads(json.dumps(child.to_json(), allow_nan=False)))
    assert found == child
    assert found.ranking == child.ranking


def test_json_writes_equal_mixers_once():
    assert len(QWEN_MOE.to_json()['mixers']) == 2
    assert QWEN_MOE.to_json()['blocks'] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    'damage',
    [
        lambda data: data.pop('mixers'),
        lambda data: data.pop('ranking'),
        lambda data: data['blocks'].append(9),
        lambda data: data['mixers'][0].update(kind='LSTM'),
        lambda data: data['mixers'][0].update(hads=3),
        lambda data: data.update(colour='red'),
        lambda data: data.update(embed='wide'),
    ],
)
def test_a_damaged_description_is_refused(damage):
    data = HYBRID.to_json()
    damage(data)
    with pytest.raises(UserError, match='damaged'):
        Arch.from_json(data)


@pytest.mark.parametrize('data', [None, 3, 'arch', []])
def test_what_is_no_description_is_refused(data):
    with pytest.raises(UserError, match='damaged'):
        Arch.from_json(data)


@pytest.mark.parametrize(
    ('arch', 'widths', 'sentence'),
    [
        (HYBRID, {'embd': 8}, "unknown axis 'embd'; did you mean 'embed'\\? known: embed, expert_width"),
        (LLAMA, {'experts': 2}, "unknown axis 'experts'"),
        (HYBRID, {'embed': 33}, 'embed=33 does not nest: the parent has 32'),
        (HYBRID, {'mlp': 49}, 'mlp@3=49 does not nest: the parent has 48'),
        (HYBRID, {'layers': 6}, 'layers=6 does not nest: the parent has 5'),
        (HYBRID, {'embed': 0}, 'width embed=0 is not a positive whole number'),
        (HYBRID, {'embed': True}, 'width embed=True is not a positive whole number'),
        (HYBRID, {'embed': 8.0}, 'width embed=8.0 is not a positive whole number'),
        (HYBRID, {'mlp@2': 8}, 'mlp@2: block 2 has no such axis; blocks that do: \\[3\\]'),
        (HYBRID, {'mlp@x': 8}, 'mlp@x: block x has no such axis'),
        (HYBRID, {'mlp@³': 8}, 'mlp@³: block ³ has no such axis'),
        (HYBRID, {'embed@1': 8}, 'axis embed holds for the whole model; write embed=8, without @1'),
        (HYBRID, {'layers@1': 1}, 'axis layers holds for the whole model'),
        (HYBRID, {'mamba_heads': 3}, 'mamba_heads@0=3 is not a multiple of its 2 groups'),
        (HYBRID, {'experts': 1}, 'experts@1=1 leaves 1 to choose top_k=2 from'),
        (GROUPED_MOE, {'experts': 6}, 'experts@1=6 do not divide into 4 routing groups, of which 2 are used'),
        (GROUPED_MOE, {'experts': 4}, 'experts@1=4 leaves 2 to choose top_k=3 from'),
    ],
)
def test_widths_that_do_not_nest_are_refused(arch, widths, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        arch.narrow(widths)
    assert '\n' not in str(caught.value)


def test_fewer_than_two_experts_in_a_routing_group_are_refused():
    moe = MoE(experts=8, expert_width=4, top_k=1, groups=4, top_groups=2)
    with pytest.raises(UserError, match='fewer than two experts in each of 4 routing groups'):
        Arch.from_pattern('E', vocab=8, embed=4, moe=moe).narrow(experts=4)


@pytest.mark.parametrize(
    ('pattern', 'mixers', 'sentence'),
    [
        ('*X', {'attention': Attention(1, 1, 4)}, "has 'X', but no mixer is given for it"),
        ('*-', {'attention': Attention(1, 1, 4)}, "has '-', but no mixer is given for it"),
        ('-', {'mlp': MLP(8, activation='gelu')}, "activation 'gelu' is not relu2 or swiglu"),
        ('-', {'mlp': MLP(0)}, 'mlp@0=0 must be at least 1'),
        ('M', {'mamba': Mamba(heads=4, head_dim=4, groups=0, state=4)}, 'groups@0=0 must be at least 1'),
        ('M', {'mamba': Mamba(heads=4, head_dim=4, groups=2, state=4, chunk=0)}, 'chunk@0=0 must be at least 1'),
        ('E', {'moe': MoE(4, 4, top_k=2, groups=0)}, 'groups@0=0 must be at least 1'),
        ('E', {'moe': MoE(4, 4, top_k=0)}, 'top_k@0=0 must be at least 1'),
        ('E', {'moe': MoE(4, 4, top_k=2, shared_width=-1)}, 'shared_width@0=-1 must be at least 0'),
        ('E', {'moe': MoE(4, 4, 2, scoring='tanh')}, "scoring 'tanh' is not sigmoid or softmax"),
        ('*', {'attention': Attention(1, 1, 5, rope=Rope())}, 'rotary needs an even head_dim'),
        ('M', {'mamba': Mamba(heads=3, head_dim=4, groups=2, state=4)}, 'mamba_heads@0=3 is not a multiple of its 2 groups'),
    ],
)
def test_mixers_that_do_not_fit_are_refused(pattern, mixers, sentence):
    with pytest.raises(UserError, match=sentence):
        Arch.from_pattern(pattern, vocab=8, embed=4, **mixers)


def test_units_must_divide_the_blocks():
    with pytest.raises(UserError, match='3 blocks do not divide into drop units of 2'):
        Arch.from_pattern('---', vocab=8, embed=4, mlp=MLP(8), unit_blocks=2)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        ({'vocab': 65}, 'vocab=65 differs from the parent, which has 64'),
        ({'norm_eps': 1e-6}, 'norm_eps=1e-06 differs'),
        ({'tied': True}, 'tied=True differs'),
        ({'mixers': HYBRID.mixers[:4]}, '4 blocks do not nest in 5: a dropped block must stay as None'),
        ({'mixers': (*HYBRID.mixers[:4], HYBRID.mixers[3])}, 'block 4 is MLP, but MoE in the parent'),
        (
            {'mixers': (*HYBRID.mixers[:4], dataclasses.replace(HYBRID.mixers[4], top_k=1))},
            'block 4 has top_k=1, but 2 in the parent',
        ),
        (
            {'mixers': (*HYBRID.mixers[:4], dataclasses.replace(HYBRID.mixers[4], shared_width=0))},
            'shared_width@4=0 does not nest',
        ),
    ],
)
def test_why_a_model_does_not_nest(change, sentence):
    assert sentence in dataclasses.replace(HYBRID, **change).why_not_nested(HYBRID)


def test_a_block_that_was_dropped_does_not_come_back():
    assert not HYBRID.nests_in(HYBRID.narrow(layers=4))


def test_parse_widths():
    assert parse_widths(' embed=96, mlp=256,mlp@3=128,') == {'embed': 96, 'mlp': 256, 'mlp@3': 128}


def test_widths_given_twice_are_refused():
    with pytest.raises(UserError, match='give embed twice'):
        parse_widths('embed=96,mlp=8,embed=64')


@pytest.mark.parametrize('text', ['embed', 'embed=', 'embed=a', 'embed=²', 'embed=-3', 'embed=1.5', '', ' , '])
def test_parse_widths_refuses(text):
    with pytest.raises(UserError, match=r'write axis=number, such as embed=96'):
        parse_widths(text)
