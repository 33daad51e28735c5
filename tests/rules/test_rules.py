"""Rules as data, kept in files, said in words, refused by name; and the order of lattices and unions."""

import dataclasses
import itertools

import pytest
import torch
from plain_rules import MATRIX

from reroute_fx import (
    AttentionRule,
    ChanceRule,
    ConfigError,
    LatticeRule,
    Method,
    RoutingConfig,
    Schedule,
    UnionRule,
    ValueRule,
    register_method,
)
from reroute_fx.methods import find_method
from reroute_fx.passes import Candidates
from reroute_fx.selection.asked_inputs import cells, text_index

UNION = UnionRule(LatticeRule(2, (1, 0)), AttentionRule(heads=[1, 2]), share=0.3)
ALL = (UNION, ValueRule("previous"), ChanceRule(), AttentionRule("own", (), "text", False))
CONFIG = RoutingConfig((1, 2, 3, 5), (0.5, 0.4, 0.3, 0.2), method="rules", rules=ALL)


def candidates(**given):
    return Candidates(**dict.fromkeys(field.name for field in dataclasses.fields(Candidates)) | given)


def test_they_are_kept_compared_and_said():
    assert RoutingConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert hash(RoutingConfig.from_dict(CONFIG.to_dict())) == hash(CONFIG)
    others = (*ALL[1:], AttentionRule("own", (), "text", True))
    assert dataclasses.replace(CONFIG, rules=others) != CONFIG
    assert CONFIG.to_dict()["rules"][1] == {"layer": "previous", "by": "values"}
    assert [str(rule) for rule in ALL] == [
        "30 % by lattice of every 2 rows and columns, shifted by 1 and 0, the rest by attention of the last token, "
        "heads 1, 2 (own layer)",
        "value similarity to the text behind the pictures (previous layer)",
        "chance",
        "attention of the text behind the pictures without positions (own layer)",
    ]
    assert CONFIG.ranks == ALL
    assert CONFIG.scoring_layers == ("own", "previous", "own", "own")


WITH = {"decision_layers": [2], "keep_ratios": [0.5], "method": "rules"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"by": "nothing"},
            r"rules\[0\] is .*expected a rule with a field by, one of \['attention', 'values'",
        ),
        ({"stride": 2}, r"rules\[0\] is .*expected a rule with a field by"),
        ({"by": "lattice", "strde": 2}, r"rules\[0\].strde is 2, but a LatticeRule has no such field"),
        ({"by": "lattice", "stride": 0}, "stride of a lattice is 0; expected"),
        ({"by": "lattice", "stride": 2, "shift": [2, 0]}, r"shift of a lattice is \(2, 0\); expected"),
        ({"by": "attention", "layer": "next"}, r"rules\[0\].layer is 'next'; expected 'own' or 'previous'"),
        ({"by": "attention", "heads": [1, 1]}, r"heads of a rule is \(1, 1\); expected each head once"),
        (
            {"by": "attention", "heads": [-1]},
            r"heads of a rule is \(-1,\); expected Python ints of 0 or more",
        ),
        ({"by": "values", "rotary": True}, r"rules\[0\].rotary is True, but a ValueRule has no such field"),
        (
            {"by": "union", "first": {"by": "chance"}, "then": {"by": "chance"}},
            r"rules\[0\].share is missing",
        ),
        (
            {"by": "union", "first": {"by": "chance"}, "then": {"by": "chance"}, "share": 1.0},
            r"share of a union is 1.0; expected a Python number in \(0, 1\)",
        ),
        (
            {"by": "union", "first": {"by": "union"}, "then": {"by": "chance"}, "share": 0.5},
            r"rules\[0\].first is .*expected a rule with a field by",
        ),
    ],
)
def test_other_rules_are_refused_in_files(rule, message):
    with pytest.raises(ConfigError, match=message):
        RoutingConfig.from_dict(WITH | {"rules": [rule]})


REFUSED = {
    "no rule": ({"rules": ()}, r"rules is \(\) with method 'rules'; expected a rule for each"),
    "a rule too many": ({"rules": (ChanceRule(),) * 2}, "decision_layers has 1 entries and rules 2"),
    "a function": ({"rules": (len,)}, "rules holds <built-in function len>; expected AttentionRule, "),
    "text": ({"rules": "attention"}, "rules is 'attention'; expected a tuple or list"),
    "two layers": (
        {"rules": (ChanceRule(),), "scoring": "previous"},
        "scoring is 'previous' together with rules",
    ),
    "none of the method's": (
        {"rules": (), "method": "coverage"},
        r"rules is \(\) with method 'coverage', each of",
    ),
    "no method": ({"rules": (ChanceRule(),), "method": "none"}, "with method 'none', which decides nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_configurations_are_refused(case):
    given, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        RoutingConfig(**{"decision_layers": (2,), "keep_ratios": (0.5,), "method": "rules"} | given)


def test_other_rules_are_refused():
    with pytest.raises(ConfigError, match="first of a union asks the own layer and then the previous layer"):
        UnionRule(AttentionRule(), ValueRule("previous"), 0.5)
    with pytest.raises(
        ConfigError, match=r"then of a union is UnionRule.*; expected a rule that is no union"
    ):
        UnionRule(AttentionRule(), UNION, 0.5)
    with pytest.raises(ConfigError, match="method is 'rules', which has no schedule"):
        RoutingConfig.from_tier(128, "rules")
    method = find_method("pdrop")
    with pytest.raises(ConfigError, match="name of the method is 'rules', which is taken"):
        register_method(dataclasses.replace(method, name="rules"))
    with pytest.raises(
        ConfigError, match=r"rules in the routed schedule of method 'a' are 1 .* one for each of 2"
    ):
        Method(
            "a",
            "",
            "",
            Schedule((2,), lambda a: (a,)),
            Schedule((2, 4), lambda a: (a, a), rules=(ChanceRule(),)),
        )


def test_schedules_bring_theirs_along():
    config = RoutingConfig.from_tier(192, "coverage", num_layers=28)
    assert config.decision_layers == (2, 6, 13, 20)
    assert [type(rule) for rule in config.rules] == [UnionRule, UnionRule, AttentionRule, AttentionRule]
    # In a decoder of four layers decisions fall together; the later one counts, with its rule.
    shallow = RoutingConfig.from_tier(0.5, "coverage", num_layers=4)
    assert shallow.decision_layers == (1, 2, 3)
    assert [type(rule) for rule in shallow.rules] == [UnionRule, AttentionRule, AttentionRule]


def test_feather_keeps_what_its_authors_keep():
    feather = RoutingConfig.from_tier(method="feather", action="physical_delete")
    assert feather.decision_layers == (8, 16)
    # 64 of 24 x 24 cells are on the lattice, and 30 % of the others are among the best 30 %.
    expected = 64 + 0.3 * (576 - 64)
    assert feather.keep_counts(576) == (int(expected), int(0.09 * expected))
    (union, attention) = feather.rules
    assert (union.first, union.then) == (LatticeRule(3), attention)
    assert round(union.share * feather.keep_counts(576)[0]) == 64


def spread(rows, columns):
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).T
    return candidates(rows=grid[0][None], columns=grid[1][None])


@pytest.mark.parametrize(("stride", "shift"), [(1, (0, 0)), (3, (0, 0)), (3, (2, 1))])
def test_a_lattice_comes_first_and_any_number_is_spread_out(stride, shift):
    size = 8 * stride
    order = LatticeRule(stride, shift)(spread(size, size))[0].argsort(descending=True, stable=True).tolist()
    on = {i * size + j for i in range(shift[0], size, stride) for j in range(shift[1], size, stride)}
    assert set(order[: len(on)]) == on
    # Of the first 4, 8, 12 ... of a lattice, as many lie in each quarter of it.
    for count in range(4, len(on) + 1, 4):
        quarters = [0] * 4
        for place in order[:count]:
            i, j = ((place // size - shift[0]) // stride, (place % size - shift[1]) // stride)
            half = size // stride / 2
            quarters[2 * (i >= half) + (j >= half)] += 1
        assert quarters == [count // 4] * 4


def test_a_lattice_of_all_cells_is_dithered_in_bayers_order():
    scores = LatticeRule(1)(spread(16, 16))[0]
    assert scores.argsort(descending=True).tolist() == MATRIX.flatten().argsort().tolist()


def test_where_text_and_cells_are():
    is_visual = torch.tensor(
        [[0, 1, 1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]]
    ).bool()
    assert text_index(is_visual, [8, 5, 3]).tolist() == [[5, 6, 7], [2, 3, 4], [2, 8, 8]]
    found = cells([[(1, 1, 2), (2, 2, 1)], [(1, 2, 1)], []])
    assert found["images"].tolist() == [[0, 0, 1, 1, 2, 2], [0] * 6, [0] * 6]
    assert found["rows"].tolist() == [[0, 0, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert found["columns"].tolist() == [[0, 1, 0, 0, 0, 0], [0] * 6, [0] * 6]


@pytest.mark.parametrize(
    ("several_pools", "share"), itertools.product([False, True], [0.25, 0.5, 5 / 17, 1 / 3])
)
def test_a_union_keeps_exactly_its_shares(several_pools, share):
    sizes, kept = ((7, 5), (4, 3)) if several_pools else ((12,), (9,))
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(1, 13)[None]
    keep = torch.tensor([[place < k for n, k in zip(sizes, kept, strict=True) for place in range(n)]])
    pools = (
        torch.tensor([[number for number, n in enumerate(sizes) for _ in range(n)]])
        if several_pools
        else None
    )
    first, then = LatticeRule(), ChanceRule()
    given = candidates(
        hidden=torch.empty(1, 14, 2),
        visual_index=index,
        lengths=torch.tensor([14]),
        keep=keep,
        pools=pools,
        rows=torch.randint(9, (1, 12), generator=generator),
        columns=torch.randint(9, (1, 12), generator=generator),
        layer=1,
        seed=3,
    )
    scores = UnionRule(first, then, share)(given)[0]
    start = 0
    for size, k in zip(sizes, kept, strict=True):
        inside = slice(start, start + size)
        quota = int(share * k + 0.5)
        mine = first(given)[0, inside].argsort(descending=True, stable=True)[:quota].tolist()
        rest = [i for i in then(given)[0, inside].argsort(descending=True).tolist() if i not in mine]
        best = scores[inside].argsort(descending=True, stable=True)[:k].tolist()
        assert set(best) == {*mine, *rest[: k - quota]}
        start += size
