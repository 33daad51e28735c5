"""Rules behind all that runs programs: compilers, artifacts, rounded sizes, reduced pictures; and what they refuse."""

import dataclasses
import functools

import pytest
import torch
from conversations import MIXED, SINGLE, TEXT, batch, build, unrouted_model
from tiny_models import llava_config
from transformers import LlavaForConditionalGeneration

import reroute_fx
from reroute_fx import (
    AttentionRule,
    ConfigError,
    InputError,
    LatticeRule,
    Limits,
    MatchError,
    Method,
    RoutingConfig,
    Schedule,
    UnionRule,
    UnsupportedModelError,
    ValueRule,
    methods,
)
from reroute_fx.capture import captured_decoder
from reroute_fx.runtime.buckets import pad_inputs


@pytest.fixture(autouse=True)
def _no_method_stays(monkeypatch):
    """A `Method` that is compiled with is known from then on."""
    monkeypatch.setattr(methods, "_methods", dict(methods._methods))


UNION = UnionRule(LatticeRule(2, (1, 1)), AttentionRule(queries="text", rotary=False), share=0.4)
CONFIG = RoutingConfig((1, 2), (0.5, 0.25), method="rules", rules=(UNION, ValueRule("previous")))


@functools.cache
def shallow():
    """Three layers: one before, between and behind the decisions."""
    return build("llava", layers=3)


@functools.cache
def eager():
    return reroute_fx.compile(shallow(), config=CONFIG, backend="eager")


def lowered(way, folder):
    if way == "inductor":
        return reroute_fx.compile(shallow(), config=CONFIG)
    limits = Limits(batch=4, length=96, image_tokens=32)
    reroute_fx.export(eager(), folder / "artifact", format=way, limits=limits)
    return reroute_fx.load(folder / "artifact")


@pytest.mark.full("30 s to 60 s each; test_lowering.py and test_artifact.py guard how programs are lowered")
@pytest.mark.parametrize("way", ["inductor", "onnx", "aot"])
@torch.no_grad()
def test_the_same_tokens_are_kept(tmp_path, way):
    routed = lowered(way, tmp_path)
    for rows in (MIXED, SINGLE):
        inputs = batch("llava", *rows)
        expected, found = eager()(**inputs), routed(**inputs)
        for layer, kept in expected.routing.selected.items():
            assert [each.tolist() for each in found.routing.selected[layer]] == [
                each.tolist() for each in kept
            ]
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-3)
    if way != "inductor":
        assert routed.routing_config == CONFIG
        assert routed(**batch("llava", *TEXT)).logits.isfinite().all()


@torch.no_grad()
def test_rounded_sizes_change_nothing():
    inputs, programs = {}, eager().programs

    def prefill(**given):
        inputs.update(given)
        return programs["prefill"](**given)

    decoder = eager().get_decoder()
    held, decoder.prefill = decoder.prefill, prefill
    try:
        expected = eager()(**batch("llava", *MIXED)).routing
    finally:
        decoder.prefill = held
    padded = pad_inputs(inputs)
    assert padded["text_index"].shape[1] == padded["rows"].shape[1] == 64
    found = programs["prefill"](**padded)["routing"]
    for layer in CONFIG.decision_layers:
        assert torch.equal(found[f"kept.{layer}"][:, :32], expected.all_kept[layer])


@torch.no_grad()
def test_cells_of_what_a_reduction_leaves():
    config = RoutingConfig((1,), (0.5,), method="avgpool", entry_ratio=0.5, rules=(LatticeRule(2),))
    routed = reroute_fx.compile(shallow(), config=config, backend="eager")
    routing = routed(**batch("llava", *MIXED)).routing
    for row, images in enumerate(routing.plan.images):
        entered = routing.entered[row].tolist()
        cells = [(place % 16 // 4, place % 4) for place in entered]
        assert len(cells) == sum(images) == 8 * MIXED[row].count(50) // 16
        on_lattice = {place for place, (i, j) in zip(entered, cells, strict=True) if not (i % 2 or j % 2)}
        kept = set(routing.selected[1][row].tolist())
        assert len(kept) == len(entered) // 2
        assert kept <= on_lattice or on_lattice <= kept


def test_the_report_says_them():
    printed = " ".join(str(eager().report).split())
    assert (
        "Rules of its own. Before layer 1 ranks by 40 % by lattice of every 2 rows and columns, " in printed
    )
    assert (
        "Before layer 2 ranks by value similarity to the text behind the pictures (previous layer)."
        in printed
    )
    report = eager().report
    assert not report.uncounted
    layer, (visual, text) = report.layers[1], (576, 40)
    rows = visual + text
    lattice_and_text = 2 * (layer.key * rows + (layer.query + layer.attention_width * rows) * text)
    values = 2 * (layer.key * rows + layer.kv_width * visual * text)
    assert report.routed.scoring_flops == lattice_and_text + values


def test_caches_of_other_rules_are_refused():
    output = eager()(**batch("llava", *SINGLE))
    other = dataclasses.replace(CONFIG, rules=(UNION, ValueRule()))
    routed = reroute_fx.compile(shallow(), config=other, backend="eager")
    with pytest.raises(InputError, match="past_key_values was made with RoutingConfig"):
        routed(input_ids=torch.tensor([[9]]), past_key_values=output.past_key_values)


@pytest.fixture
def untraced(monkeypatch):
    """Nothing may be traced."""
    monkeypatch.setattr(captured_decoder, "_export", lambda *_: pytest.fail("the decoder was traced"))
    monkeypatch.setattr(captured_decoder, "_captured", {})
    monkeypatch.setattr(captured_decoder, "_alike", {})


def test_heads_that_are_not_there_are_refused(untraced):
    config = RoutingConfig((1,), (0.5,), method="rules", rules=(AttentionRule(heads=(1, 4)),))
    with pytest.raises(ConfigError, match=r"heads of a rule is \(1, 4\); expected heads in 0\.\.3"):
        reroute_fx.compile(shallow(), config=config)


def by_column(candidates):
    return -candidates.columns.float()


LATE = Schedule((16,), lambda a: (a,))
COLUMNS = Method("columns", "a test", "columns", LATE, LATE, rank=by_column, default_tier=0.75)


@pytest.mark.parametrize(
    "given", [{"method": COLUMNS, "tier": 0.6}, {"method": "coverage", "tier": 0.5}], ids=["own", "rules"]
)
def test_lattices_need_known_cells(untraced, given):
    # The CLS token is no cell.
    model = LlavaForConditionalGeneration(llava_config(4, vision_feature_select_strategy="full")).eval()
    with pytest.raises(UnsupportedModelError, match=r"ranks by columns.*lie in their pictures is not known"):
        reroute_fx.inspect(model, **given)


@torch.no_grad()
def test_functions_of_ones_own_get_cells():
    routed = reroute_fx.compile(unrouted_model("qwen"), method=COLUMNS, tier=0.75, backend="eager")
    inputs = batch("qwen", *SINGLE)
    routing = routed(**inputs).routing
    # `generate` encodes pictures before it calls the model, and repeats rows for beams.
    several = batch("qwen", *MIXED)
    new = routed.generate(**several, max_new_tokens=2, num_beams=2, do_sample=False)
    assert new.shape == (3, several["input_ids"].shape[1] + 2)
    (layer,) = routing.config.decision_layers
    kept = routing.selected[layer][0].tolist()
    # The picture of prompt 7 has 2 rows and 8 columns.
    assert kept == [place for place in range(16) if place % 8 < len(kept) // 2]


def test_pictures_without_a_grid_are_refused():
    rules = (LatticeRule(),)
    config = RoutingConfig((1,), (0.5,), method="rules", rules=rules)
    routed = reroute_fx.compile(shallow(), config=config, backend="eager")
    embeds, mask = torch.randn(1, 14, 32), torch.zeros(1, 14, dtype=torch.bool)
    mask[:, 2:12] = True
    with pytest.raises(
        InputError, match="A picture has 10 visual tokens, but rules or blocks ask for rows and columns"
    ):
        routed(inputs_embeds=embeds, visual_mask=mask)


def two(candidates):
    return candidates.text_values, candidates.rows


def test_rules_that_return_something_else_are_refused():
    method = Method("two", "a test", "nothing", LATE, LATE, rank=two, default_tier=0.75)
    with pytest.raises(MatchError, match="The ranking rule two returned 2 tensors; expected one tensor"):
        reroute_fx.compile(shallow(), method=method, tier=0.75, backend="eager")
