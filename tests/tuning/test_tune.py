"""Tuning as a user does it: on a tiny model, with few trials."""

import dataclasses
import json
import math
import re

import pytest
import torch
from conversations import batch, build, prompt, unrouted_model
from transformers import LlamaConfig, LlamaForCausalLM

import reroute_fx
from reroute_fx import AttentionRule, ChanceRule, ConfigError, InputError, RoutingConfig, tune
from reroute_fx.config.tuned_config import ModelKind
from reroute_fx.errors import UnsupportedModelError
from reroute_fx.tuning import tune as front
from reroute_fx.tuning.divergence import Losses, Router, answer
from reroute_fx.tuning.judging import choose, not_dominated
from reroute_fx.tuning.search_space import SearchSpace
from reroute_fx.tuning.tuned import Finalist

RULES = (AttentionRule(), ChanceRule())
TIER, ANSWER = 0.5, 4


def prompts(family="llava", count=4):
    """Batches of three."""
    return [
        batch(family, *(prompt(7 + 3 * i + row, 9 + i, 11, 13 + row) for row in range(3)))
        for i in range(count)
    ]


def text_model():
    """Without a tower."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )


def search(log=None, trials=16, **options):
    given = {
        "tier": TIER,
        "rules": RULES,
        "workers": 1,
        "max_new_tokens": ANSWER,
        "progress": False,
        **options,
    }
    return tune(unrouted_model("llava"), prompts(), trials=trials, log=log, **given)


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a search of 16 trials wrote into its file, and what it found."""
    log = tmp_path_factory.mktemp("tuning") / "log.jsonl"
    tuned = search(log)
    return log.read_text().splitlines(), tuned


@pytest.fixture
def log(found, tmp_path):
    """The file of that search once more."""
    (path := tmp_path / "log.jsonl").write_text("\n".join([*found[0], ""]))
    return path


def what(tuned):
    """All that a search finds."""
    return tuned.config, tuned.table, tuned.reference, tuned.history


def test_what_is_found_loses_no_more_at_the_same_cost(found):
    _, tuned = found
    assert len(tuned.history) == tuned.facts.trials == 16
    assert tuned.history[0] == tuned.reference.divergence  # it is tried first
    assert tuned.table[0].divergence <= min(tuned.reference.divergence, tuned.facts.divergence)
    for each in tuned.table:
        assert each.config.average_tokens(4) <= tuned.reference.config.average_tokens(4)
        assert abs(each.cost - 1) <= 0.01


def test_the_table_is_not_dominated_and_has_the_chosen_one(found):
    _, tuned = found
    assert tuned.config in [each.config for each in tuned.table]
    others = [each for each in tuned.table if each.config != tuned.config]
    assert not_dominated(others) == others
    assert (tuned.facts.prompts, tuned.facts.held_out_prompts) == (12, 3)
    assert {(len(e.searched.divergence), len(e.held_out.divergence)) for e in tuned.table} == {(9, 3)}


def test_divergences_are_those_of_the_compiled_model(found):
    """Against logits in float64, one token at a time."""
    _, tuned = found
    model = unrouted_model("llava")
    routed = reroute_fx.compile(model, config=tuned.config, backend="eager")
    expected = [loss for inputs in prompts() for loss in divergence(model, routed, inputs)]
    chosen = next(each for each in tuned.table if each.config == tuned.config)
    losses = (chosen.searched + chosen.held_out).divergence
    assert sorted(losses) == pytest.approx(sorted(expected), abs=1e-4)


@torch.no_grad()
def divergence(model, routed, inputs):
    """Of each row."""
    width = inputs["input_ids"].shape[1]
    answers = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)[:, width:]
    outputs, total = {each: each(**inputs) for each in (model, routed)}, 0
    for token in answers.unbind(1):
        p, q = (outputs[each].logits[:, -1].double().log_softmax(-1) for each in (model, routed))
        total = total + (p.exp() * (p - q)).sum(-1)
        outputs = {
            each: each(input_ids=token[:, None], past_key_values=outputs[each].past_key_values)
            for each in (model, routed)
        }
    return (total / answers.shape[1]).tolist()


def test_the_unrouted_model_loses_nothing():
    model = unrouted_model("qwen")
    unrouted = reroute_fx.compile(model, method="none", backend="eager")
    answered = answer(unrouted, prompts("qwen", 1)[0], ANSWER)
    losses = Router(model, unrouted).losses(RoutingConfig((2,), (1.0,)), [answered])
    assert losses.divergence == pytest.approx([0.0] * 3, abs=1e-5)
    assert losses.agreement == (1.0,) * 3


def test_the_same_seed_finds_the_same_with_more_workers(found):
    _, tuned = found
    assert what(search(workers=2)) == what(tuned)


@pytest.mark.full("31 s; proposals and the search are tested apart")
def test_left_to_itself_it_tries_what_a_profile_proposes(monkeypatch, tmp_path):
    profiles = []

    def profile(model, batches, **options):
        profiles.append((batches, front_profile(model, batches, **options)))
        return profiles[-1][1]

    front_profile = front.profile
    monkeypatch.setattr(front, "profile", profile)
    search(log := tmp_path / "log", trials=3, rules=None)
    ((batches, found),) = profiles
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 3]  # not what is held out
    proposed = [proposal.config for proposal in found.proposals(num=8)]
    jobs = [json.loads(json.loads(line)["job"])[0] for line in log.read_text().splitlines()[1:]]
    tried = {(*job["decision_layers"], *(rule["by"] for rule in job["rules"])) for job in jobs}
    wanted = {
        (*config.decision_layers, *("attention" for _ in config.decision_layers)) for config in proposed
    }
    assert len(tried & wanted) >= 2


@pytest.mark.full("20 s; an interrupt and a log that is read again are in the gate")
def test_cut_short_and_resumed_is_as_in_one_go(found, log):
    lines, tuned = found
    # A killed process leaves a line half written.
    log.write_text("\n".join([*lines[:-8], lines[-8][:20]]))
    assert what(search(log)) == what(tuned)
    assert log.read_text().splitlines() == lines


def test_what_is_in_the_log_is_not_measured_again(found, log, monkeypatch):
    def measure_again(*_):
        raise AssertionError("everything is in the log")

    monkeypatch.setattr(Router, "losses", measure_again)
    assert what(search(log)) == what(found[1])


def test_what_is_missed_counts_too(found, log):
    tuned = search(log.with_name("with targets"), trials=4, target_weight=2.0)
    for each in tuned.table:
        losses = each.searched
        totals = [a + 2 * b for a, b in zip(losses.divergence, losses.missed, strict=True)]
        assert each.loss == pytest.approx(sum(totals) / len(totals))
        assert 0 < each.missed < 1
    assert tuned.table[0].loss == min(each.loss for each in tuned.table)
    assert tuned.facts.target_weight == 2
    chosen = next(each for each in tuned.table if each.config == tuned.config)
    assert tuned.facts.missed == chosen.missed
    assert "missed" in str(tuned)
    assert found[1].reference.missed is found[1].facts.missed is None
    assert "missed" not in str(found[1])
    with pytest.raises(ConfigError, match="written with another targets: False; expected True"):
        search(log, trials=8, target_weight=2.0)


def test_an_interrupt_keeps_what_was_found(found, log, tmp_path, monkeypatch, capsys):
    _, tuned = found
    rounds = []

    def second_round(self, *arguments):
        if rounds:
            raise KeyboardInterrupt
        rounds.append(1)
        return one_round(self, *arguments)

    one_round = front.Search.next_round
    monkeypatch.setattr(front.Search, "next_round", second_round)
    stopped = search(log, progress=True)
    assert stopped.stopped == "interrupted"
    assert stopped.history == tuned.history[:8]
    assert "Ctrl-C" in capsys.readouterr().err
    stopped.save(path := tmp_path / "tuned.json")
    routed = reroute_fx.compile(unrouted_model("llava"), config=path, backend="eager")
    assert routed.routing_config == stopped.config
    with pytest.raises(KeyboardInterrupt):
        search(log)


def test_time_that_is_up_ends_the_search_after_a_round(found, log, capsys):
    _, tuned = found
    short = search(log, trials=None, seconds=0.01, progress=True)
    assert short.history == tuned.history[:8]
    assert re.search(r"Plan: as many trials as fit, [\d.]+ s each", capsys.readouterr().err)
    assert search(log, trials=100, seconds=0.01).stopped == "the time is up"


@pytest.mark.full("two more searches; the gate draws from the space of deletion")
def test_it_deletes_too_with_shares_that_fall():
    tuned = search(action="physical_delete", trials=8)
    for each in tuned.table:
        assert each.config.action == "physical_delete"
        assert list(each.config.keep_ratios) == sorted(each.config.keep_ratios, reverse=True)


def test_the_file_compiles_and_names_what_it_is_for(found, tmp_path):
    _, tuned = found
    tuned.save(path := tmp_path / "tuned.json")
    routed = reroute_fx.compile(unrouted_model("llava"), config=path, backend="eager")
    assert routed.routing_config == tuned.config == RoutingConfig.load(path)
    told = json.loads(path.read_text())["tuned"]
    assert told["model"] == dataclasses.asdict(ModelKind.of(unrouted_model("llava").config))
    assert told["divergence"] == tuned.facts.divergence
    assert {"reroute-fx", "torch", "transformers", "optuna"} <= told["versions"].keys()


@pytest.mark.parametrize(
    ("family", "layers", "kind"),
    [("qwen", 4, "qwen2_5_vl of 4 layers"), ("llava", 6, "llava of 6 layers")],
)
def test_the_file_of_another_model_or_depth_is_refused(found, tmp_path, monkeypatch, family, layers, kind):
    found[1].save(path := tmp_path / "tuned.json")
    _refuse_to_trace(monkeypatch)
    with pytest.raises(ConfigError, match=rf"was tuned for a llava of 4 layers.*is a {kind}"):
        reroute_fx.compile(build(family, layers), config=path)


def test_it_prints_and_draws(found, tmp_path):
    _, tuned = found
    text = str(tuned)
    assert "chosen" in text
    assert f"before layer {tuned.config.decision_layers[0]} keep" in text
    tuned.plot(tmp_path / "tuned.png")
    assert (tmp_path / "tuned.png").stat().st_size > 10_000
    with pytest.raises(InputError, match=r"ends in one of"):
        tuned.plot(tmp_path / "tuned.txt")


def finalist(layers, *losses, cost=1.0, rules=(0, 0, 0)):
    config = RoutingConfig(
        layers, (0.5,) * len(layers), method="rules", rules=[RULES[i] for i in rules[: len(layers)]]
    )
    return Finalist(config, cost, Losses(losses, losses), Losses((0.5,), (1.0,)))


SPACE = SearchSpace((), TIER, "compact_route_stagewise", RULES)
CLOSEST = finalist((1, 2, 3), 0.1, 0.2, 0.3, 0.2)


@pytest.mark.parametrize(
    ("other", "is_chosen"),
    [
        pytest.param(finalist((1, 2), 0.2, 0.1, 0.4, 0.2), True, id="as close and fewer decisions"),
        pytest.param(finalist((1, 2), 0.3, 0.4, 0.5, 0.4), False, id="farther on every prompt"),
        pytest.param(finalist((1, 2), 0.1, 0.2, 0.2, 0.6), False, id="too few prompts to tell, not as close"),
        pytest.param(
            finalist((1, 2, 3), 0.2, 0.1, 0.4, 0.2, rules=(0, 0, 1)), False, id="more kinds of rules"
        ),
    ],
)
def test_of_two_that_cant_be_told_apart_the_simpler_wins(other, is_chosen):
    assert (choose([CLOSEST, other], SPACE) is other) == is_chosen


def test_what_is_dominated_is_left_out():
    close, cheap, worse = finalist((1,), 0.1), finalist((1,), 0.2, cost=0.99), finalist((1,), 0.2)
    assert not_dominated([worse, cheap, close]) == [close, cheap]
    assert not_dominated([worse, worse]) == [worse, worse]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tier": 100}, ConfigError, r"tier is 100; expected one of \[192, 128, 64\] or a float"),
        ({"tier": 0.1}, ConfigError, "tier asks for 57.6 of 576 visual tokens on average, but"),
        ({"trials": 0}, ConfigError, "trials is 0; expected a whole number above 0, or None"),
        ({"seconds": -1}, ConfigError, "seconds is -1; expected a number above 0, or None"),
        ({"workers": 1.5}, ConfigError, "workers is 1.5; expected a whole number above 0, or None"),
        ({"seed": -1}, ConfigError, "seed is -1; expected a Python int"),
        ({"target_weight": -1}, ConfigError, "target_weight is -1; expected a number of 0 or more"),
        ({"target_weight": math.nan}, ConfigError, "target_weight is nan; expected a number of 0 or more"),
        ({"action": "forget"}, ConfigError, "action is 'forget'; expected one of"),
        ({"rules": ()}, ConfigError, "rules is empty; expected one or more, or None"),
        ({"rules": ("attention",)}, ConfigError, "rules holds 'attention'; expected"),
        ({"prompts": prompts(count=1)}, InputError, "prompts has 3 prompts; expected at least 8"),
        ({"prompts": [batch("llava", *[prompt(7, 9)] * 8)]}, InputError, "prompts come in 1 batches"),
        ({"prompts": [batch("llava", [1, 5, 6])] * 8}, InputError, "have no picture"),
        ({"model": torch.nn.Linear(1, 1)}, UnsupportedModelError, "model is a Linear; expected a Hugging Face"),
        ({"model": text_model()}, UnsupportedModelError, "LlamaConfig names no image or video token"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_anything_is_traced(change, error, message, monkeypatch):
    _refuse_to_trace(monkeypatch)
    given = {"model": unrouted_model("llava"), "prompts": prompts(), "tier": TIER, "progress": False} | change
    with pytest.raises(error, match=message):
        tune(**given)


def _refuse_to_trace(monkeypatch):
    def trace(*_, **__):
        raise AssertionError("the model was traced")

    monkeypatch.setattr(front.api, "capture_decoder", trace)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(reroute_fx.BackendUnavailableError, match=r"pip install 'reroute-fx\[tune\]'"):
        search()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("no log\n", "holds something else", id="text"),
        pytest.param('{"model": "another"}\n', "holds something else", id="other facts"),
        pytest.param(None, "written with another prompts_sha256", id="other prompts"),
    ],
)
def test_a_log_of_something_else_is_refused(found, tmp_path, content, message):
    header = json.loads(found[0][0]) | {"prompts_sha256": "another"}
    (other := tmp_path / "log").write_text(content or json.dumps(header) + "\n")
    before = other.read_text()
    with pytest.raises(ConfigError, match=message):
        search(other)
    assert other.read_text() == before
