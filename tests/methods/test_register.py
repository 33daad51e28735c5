"""A method of one's own: registered, compiled, exported; and what is refused."""

import json
import pickle
import subprocess
import sys

import pytest
import torch
from artifacts import LIMITS, TIERS, artifact, remember, routed_at
from conversations import SINGLE, batch, unrouted_model
from suite_tiers import one

import reroute_fx
from reroute_fx import ConfigError, InputError, MatchError, Method, RoutingConfig, Schedule, methods
from reroute_fx.methods import all_methods


def by_size(candidates):
    """The norm of each token's hidden state."""
    place = candidates.visual_index.clamp(max=candidates.hidden.shape[1] - 1)
    return candidates.hidden.norm(dim=-1).gather(1, place)


@pytest.fixture(scope="module")
def largest():
    """A method of one's own, in a few lines; forgotten again, for other tests list what there is."""
    reroute_fx.register_method(
        Method(
            name="largest",
            source="a test",
            ranks_by="norm of the hidden state",
            deleted=Schedule(layers=(8, 16), ratios=lambda a: (a, a / 2)),
            routed=Schedule(layers=(8, 16), ratios=lambda a: (a, a)),
            rank=by_size,
            default_tier=0.5,
        )
    )
    yield
    methods._methods.pop("largest")


def candidates_of(model, inputs, layer):
    """Norms of the visual tokens where they enter a layer, from the unrouted model."""
    states = model(**inputs, output_hidden_states=True).hidden_states[layer]
    is_visual = inputs["input_ids"] == model.config.image_token_id
    return states[is_visual].norm(dim=-1)


@one("4 s each")
@pytest.mark.parametrize("action", ["physical_delete", "compact_route_stagewise"])
@torch.no_grad()
def test_a_method_of_ones_own_selects(largest, action):
    model, inputs = unrouted_model("llava"), batch("llava", *SINGLE)
    routed = reroute_fx.compile(model, 0.6, method="largest", action=action, backend="eager")
    first, *_ = routed.routing_config.decision_layers
    routing = routed(**inputs).routing
    norms = candidates_of(model, inputs, first)
    torch.testing.assert_close(routing.scores[first][0], norms)
    best = norms.topk(len(routing.selected[first][0])).indices.sort().values
    assert torch.equal(routing.selected[first][0], best)


@pytest.mark.full("54 s; methods select in the gate, and what is routed is compiled in other tests")
def test_it_generates_compiled_and_runs_from_an_artifact_that_knows_no_method(
    largest, tmp_path, tmp_path_factory
):
    model, inputs = unrouted_model("llava"), batch("llava", *SINGLE)
    eager = reroute_fx.compile(model, 0.6, method="largest", backend="eager")
    compiled = reroute_fx.compile(model, 0.6, method="largest")
    options = {"max_new_tokens": 6, "do_sample": False}
    tokens = eager.generate(**inputs, **options)
    assert torch.equal(compiled.generate(**inputs, **options), tokens)
    # Most of its regions are those of another method.
    remember(artifact(tmp_path_factory, "llava"), routed_at("llava", TIERS[0]))
    folder = reroute_fx.export(eager, tmp_path / "artifact", limits=LIMITS)
    torch.save(inputs, tmp_path / "inputs.pt")
    script = (
        "import torch, reroute_fx; inputs = torch.load('inputs.pt'); model = reroute_fx.load('artifact');"
        "print(model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist(), model.routing_config.method)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder.parent, capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[-2] == f"{tokens.tolist()} largest", done.stderr
    assert json.loads((folder / "manifest.json").read_text())["routing"]["method"] == "largest"


def test_the_report_says_what_is_not_counted(largest):
    report = reroute_fx.inspect(unrouted_model("llava"), 0.6, method="largest")
    assert report.uncounted == ("ranking by norm of the hidden state",)
    assert report.routed.scoring_flops == 0
    assert "Method: a test. Ranks by norm of the hidden state (deciding layer)" in " ".join(
        str(report).split()
    )


SCHEDULE = Schedule(layers=(8, 16), ratios=lambda a: (a, a))


def method(**changes):
    given = {
        "name": "new",
        "source": "",
        "ranks_by": "",
        "deleted": SCHEDULE,
        "routed": SCHEDULE,
        "default_tier": 0.5,
    }
    return Method(**{**given, **changes})


def schedule(**changes):
    return {"routed": Schedule(**{"layers": (8, 16), "ratios": lambda a: (a, a), **changes})}


@pytest.mark.parametrize(
    ("changes", "parts"),
    {
        "default tier": (
            {"default_tier": 128},
            ("default_tier of method 'new' is 128", "a share above 0.2500", "Name a higher one"),
        ),
        "no name": ({"name": " "}, ("name of the method is ' '", "expected a word")),
        "rule without argument": (
            {"rank": lambda: 0},
            ("rank of method 'new'", "a function of one argument"),
        ),
        "rule of two": (
            {"rank": lambda a, b: 0},
            ("rank of method 'new'", "missing a required argument: 'b'"),
        ),
        "no rule": ({"rank": 3}, ("rank of method 'new' is 3", "a function of one argument")),
        "positions": ({"positions": "new"}, ("positions of method 'new' is 'new'", "'contiguous'")),
        "layer 0": (schedule(layers=(0, 7)), ("layers in the routed schedule of method 'new'", "1..31")),
        "too deep": (schedule(layers=(7, 32)), ("layers in the routed schedule of method 'new'", "1..31")),
        "no layers": (schedule(layers=()), ("layers in the routed schedule of method 'new'", "ascending")),
        "scoring": (schedule(scoring="next"), ("scoring in the routed schedule", "['own', 'previous']")),
        "too many tokens": (
            schedule(ratios=lambda a: (a, 2 * a)),
            ("ratios(1.0) in the routed schedule", "2 shares in (0, 1]", "more tokens than there are"),
        ),
        "too few shares": (
            schedule(ratios=lambda a: (a,)),
            ("ratios(0.001) in the routed", "expected 2 shares"),
        ),
        "published": (
            schedule(published={64: (0.1, 576.0)}),
            ("published[64] in the routed schedule", "shares in (0, 1]"),
        ),
    }.values(),
)
def test_a_faulty_method_is_refused(changes, parts):
    with pytest.raises(ConfigError) as caught:
        method(**changes)
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("name", ["pdrop", "none"])
def test_names_are_taken_once(name):
    with pytest.raises(ConfigError, match=f"name of the method is '{name}', which is taken"):
        reroute_fx.register_method(method(name=name))


@pytest.fixture
def new_name():
    """What a test registers under the name of `method` is forgotten again."""
    yield
    methods._methods.pop("new", None)


def test_a_method_from_the_same_place_replaces_the_one_before(new_name):
    """As a cell of a notebook that is run again."""
    cell = (
        "def rank(candidates):\n    return candidates.keys.mean(dim=(1, 3)) * factor\n"
        "def ratios(a):\n    return (a, a)\n"
    )
    for factor in (1, 2):
        names = {"__name__": "__main__", "factor": factor}
        exec(cell, names)
        again = method(rank=names["rank"], **schedule(ratios=names["ratios"]))
        assert reroute_fx.register_method(again) is again
        assert methods.find_method("new") is again
    with pytest.raises(ConfigError, match="name of the method is 'new', which is taken"):
        reroute_fx.register_method(method(rank=by_size))
    assert methods.find_method("new") is again


def test_the_same_rule_with_other_functions_is_another_method(new_name):
    reroute_fx.register_method(method())
    with pytest.raises(ConfigError, match="which is taken"):
        reroute_fx.register_method(method(**schedule(ratios=by_size_ratios)))


def by_size_ratios(a):
    return (a, a)


@torch.no_grad()
def test_a_method_itself_is_taken_and_a_configuration_keeps_it(new_name):
    model, inputs = unrouted_model("llava"), batch("llava", *SINGLE)

    def by_rank(sign):
        return method(rank=lambda candidates: sign * by_size(candidates), ranks_by=f"size times {sign}")

    largest = reroute_fx.compile(model, 0.6, method=by_rank(1), backend="eager")
    smallest = reroute_fx.compile(model, 0.6, method=by_rank(-1), backend="eager")
    assert "size times 1" in str(largest.report)
    assert "size times -1" in str(smallest.report)
    again = reroute_fx.compile(model, config=largest.routing_config, backend="eager")
    first, *_ = largest.routing_config.decision_layers
    kept = [routed(**inputs).routing.selected[first][0] for routed in (largest, smallest, again)]
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[1])


def test_a_configuration_of_a_registered_method_can_be_pickled(new_name):
    reroute_fx.register_method(method())
    config = RoutingConfig((2,), (0.5,), method="new")
    assert pickle.loads(pickle.dumps(config)) == config
    assert pickle.loads(pickle.dumps(config)).definition is config.definition


def test_only_methods_are_registered():
    with pytest.raises(ConfigError, match=r"method is a function; expected a reroute_fx\.Method"):
        reroute_fx.register_method(by_size)


BAD_RULES = {
    "shape": (lambda c: c.keys.mean(dim=(1, 2, 3)), "expected a score for each candidate"),
    "whole numbers": (lambda c: c.visual_index, "floating point"),
    "data": (lambda c: c.keys.mean() if c.keys.mean() > 0 else c.keys, "can't be traced"),
    "sizes": (
        lambda c: c.visual_index.float() if c.visual_index.shape[1] > 4 else -c.visual_index.float(),
        "chooses by the sizes",
    ),
    "own tensor": (lambda c: c.visual_index * torch.tensor([0.5]), "brings a tensor of its own"),
    "error": (lambda c: c.nothing, "has no attribute 'nothing'"),
    "several": (lambda c: (c.keys, c.query), "expected one tensor"),
}


@pytest.mark.parametrize(("rule", "part"), BAD_RULES.values(), ids=BAD_RULES)
def test_a_faulty_rule_is_named_when_it_is_traced(rule, part, monkeypatch):
    monkeypatch.setitem(methods._methods, "faulty", method(name="faulty", rank=rule))
    with pytest.raises(MatchError, match="The ranking rule") as caught:
        reroute_fx.inspect(unrouted_model("llava"), 0.6, method="faulty")
    assert part in str(caught.value)


@pytest.mark.parametrize("layers", [16, 28, 32])
@pytest.mark.parametrize("action", ["physical_delete", "compact_route"])
def test_averages_are_the_tier(layers, action):
    for each in all_methods():
        # What a method can't reach is refused; its own tier it always can.
        tiers = [tier for tier in (192, 128, 64) if each.default_tier == 128 or tier == 192]
        for tier in [*tiers, each.default_tier]:
            config = RoutingConfig.from_tier(tier, each.name, action, num_layers=layers)
            wanted = tier if tier in (192, 128, 64) else 576 * tier
            assert abs(config.average_tokens(layers) - wanted) <= 1, (each.name, tier)


def test_what_a_method_cannot_reach_is_refused():
    with pytest.raises(ConfigError, match="'pdrop-official' in 32 layers can't go below 144"):
        RoutingConfig.from_tier(128, "pdrop-official")
    with pytest.raises(ConfigError, match="no ratios were published"):
        RoutingConfig.from_tier(192, "random", schedule="paper")


def test_numbers_of_tokens(largest):
    config = RoutingConfig((1, 2), keep_tokens=(3, 2), method="fastv")
    assert config.keep_counts(576) == (3, 2)
    inputs = batch("llava", *SINGLE)
    routed = reroute_fx.compile(unrouted_model("llava"), config=config, backend="eager")
    selected = routed(**inputs).routing.selected
    assert [len(selected[layer][0]) for layer in (1, 2)] == [3, 2]
    too_many = RoutingConfig((1,), keep_tokens=(577,), method="fastv")
    routed = reroute_fx.compile(unrouted_model("llava"), config=too_many, backend="eager")
    with pytest.raises(
        InputError, match=r"Row 0 has a pool of \d+ visual tokens, but keep_tokens is \[577\]"
    ):
        routed(**inputs)
