"""Two scales, against the layers of transformers in double precision with blocks that plain torch pools."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from conversations import GRIDS, MIXED, SINGLE, batch, new_tokens, prompt, unrouted_model
from suite_tiers import one
from tiny_models import IMAGE
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

import reroute_fx
from reroute_fx import ConfigError, InputError, RoutingConfig, UnsupportedModelError
from reroute_fx.methods.tiers import REFERENCE_TOKENS

CONFIG = RoutingConfig((1, 2, 3), (0.5, 0.4, 0.2), method="two-scale", block=2, block_decisions=2)
DELETING = RoutingConfig((1, 3), (0.6, 0.3), "physical_delete", "two-scale", block=2, block_decisions=1)
TOLERANCE = 1e-4
"""Of logits near 8; another selection moves them by 1e-1 and more."""


@functools.cache
def precise(family):
    model = copy.deepcopy(unrouted_model(family)).double()
    model.set_attn_implementation("eager")
    return model


@functools.cache
def two_scale(family, config, backend="eager"):
    return reroute_fx.compile(unrouted_model(family), config=config, backend=backend)


def pooled(features, grid):
    """Features of a picture with the means of its 2 x 2 blocks in them, and the tokens that hold these."""
    rows, columns = grid
    means = F.avg_pool2d(features.T.reshape(1, -1, rows, columns), 2).flatten(2)[0].T
    middles = [row * columns + column for row in range(1, rows, 2) for column in range(1, columns, 2)]
    return features.index_copy(0, torch.tensor(middles), means), middles


def by_hand(family, row, config):
    """All logits of a prompt ``[S, V]``, and for each decision what it keeps of the visual tokens."""
    model, inputs = precise(family), batch(family, row)
    text, ids = model.model.language_model, inputs["input_ids"]
    stream, positions = model.get_input_embeddings()(ids), torch.arange(ids.shape[1])[None]
    visual, always = (ids[0] == IMAGE).nonzero().flatten().tolist(), []
    if visual:
        features = model.get_image_features(**pixels(inputs)).pooler_output
        grids = [(4, 4)] * len(features)
        if family == "qwen":
            names = ("input_ids", "mm_token_type_ids", "image_grid_thw")
            positions, _ = model.model.get_rope_index(**{name: inputs[name] for name in names})
            grids = [(height // 2, width // 2) for _, height, width in inputs["image_grid_thw"].tolist()]
        parts = [pooled(each, grid) for each, grid in zip(features, grids, strict=True)]
        stream[0, visual] = torch.cat([part for part, _ in parts])
        always = [16 * number + middle for number, (_, middles) in enumerate(parts) for middle in middles]
    elif family == "qwen":
        positions = positions.expand(3, 1, -1)
    cos, sin = text.rotary_emb(stream, positions)
    active, kept, pool = list(range(ids.shape[1])), {}, list(range(len(visual)))

    def run(layer, places):
        mask = torch.full((1, 1, len(places), len(places)), -torch.inf, dtype=torch.float64).triu(1)
        given = {"position_embeddings": (cos[:, places], sin[:, places]), "attention_mask": mask}
        _, attention = layer.self_attn(layer.input_layernorm(stream[:, places]), **given)
        return layer(stream[:, places], **given), attention

    for index, layer in enumerate(text.layers):
        if index in config.decision_layers:
            decision = config.decision_layers.index(index)
            deletes = config.action == "physical_delete"
            _, attention = run(layer, active if deletes else list(range(ids.shape[1])))
            of_place = dict(
                zip(active if deletes else range(ids.shape[1]), attention[0].mean(0)[-1], strict=True)
            )
            forced = always if decision < config.block_decisions else []
            others = sorted(set(pool) - set(forced), key=lambda i: -of_place[visual[i]])
            count = config.keep_count(decision, len(visual))
            kept[index] = sorted([*forced, *others[: count - len(forced)]])
            pool = kept[index] if deletes else pool
            active = sorted({*range(ids.shape[1])} - {*visual} | {visual[i] for i in kept[index]})
        stream[:, active] = run(layer, active)[0]
    return model.lm_head(text.norm(stream))[0], kept


def pixels(inputs):
    return {
        name: inputs[name].double() if name == "pixel_values" else inputs[name]
        for name in inputs
        if "pixel" in name or "grid" in name
    }


@one("2 s each")
@pytest.mark.parametrize(("family", "config"), [("llava", CONFIG), ("qwen", CONFIG), ("qwen", DELETING)])
@torch.no_grad()
def test_as_by_hand(family, config):
    """One picture, none, and two, padded; for Qwen of 4 x 4 and 2 x 8 tokens."""
    assert GRIDS == [[1, 8, 8], [1, 4, 16]]
    inputs = batch(family, *MIXED, pad="right")
    output = two_scale(family, config)(**inputs)
    for row, ids in enumerate(MIXED):
        logits, kept = by_hand(family, ids, config)
        for layer, selected in output.routing.selected.items():
            assert selected[row].tolist() == kept[layer]
        torch.testing.assert_close(output.logits[row, : len(ids)].double(), logits, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_pooling_and_keeping_blocks_both_matter():
    """Or the test above could not tell."""
    logits, kept = by_hand("llava", SINGLE[0], CONFIG)
    plain = RoutingConfig(CONFIG.decision_layers, CONFIG.keep_ratios)
    output = reroute_fx.compile(unrouted_model("llava"), config=plain, backend="eager")(
        **batch("llava", *SINGLE)
    )
    assert output.routing.selected[1][0].tolist() != kept[1]
    assert (output.logits[0].double() - logits).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_in_a_batch_is_as_alone(beams):
    """`generate` encodes the pictures first, and repeats rows for beams."""
    routed, asked = two_scale("qwen", CONFIG), {"max_new_tokens": 5, "num_beams": beams}
    together = new_tokens(routed, batch("qwen", *MIXED), **asked)
    for row, ids in enumerate(MIXED):
        assert torch.equal(new_tokens(routed, batch("qwen", ids), **asked)[0], together[row])


@pytest.mark.full("39 s; it runs in eager in the gate")
@torch.no_grad()
def test_inductor_selects_the_same():
    inputs = batch("llava", *SINGLE)
    eager, compiled = (two_scale("llava", CONFIG, backend)(**inputs) for backend in ("eager", "inductor"))
    for layer in CONFIG.decision_layers:
        assert torch.equal(*(output.routing.selected[layer][0] for output in (eager, compiled)))
    torch.testing.assert_close(eager.logits, compiled.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.full("it compiles ahead of time, as test_artifact.py does in the gate")
@torch.no_grad()
def test_artifact(tmp_path):
    routed, inputs = two_scale("qwen", CONFIG), batch("qwen", *MIXED)
    reroute_fx.export(routed, tmp_path / "made")
    loaded = reroute_fx.load(tmp_path / "made")
    assert loaded.routing_config == CONFIG
    expected, found = (model(**inputs) for model in (routed, loaded))
    for layer in CONFIG.decision_layers:
        for kept, other in zip(expected.routing.selected[layer], found.routing.selected[layer], strict=True):
            assert torch.equal(kept, other)
    torch.testing.assert_close(expected.logits[:, -1], found.logits[:, -1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tier", [192, 128, 64])
@pytest.mark.parametrize("layers", [16, 28, 32])
def test_a_tier_is_exact(tier, layers):
    config = RoutingConfig.from_tier(tier, "two-scale", num_layers=layers)
    assert abs(config.average_tokens(layers) - tier) <= 1
    tokens = config.tokens_per_layer(layers)
    for kept in config.keep_counts()[: config.block_decisions]:
        assert kept > REFERENCE_TOKENS // config.block**2
    assert tokens[0] == REFERENCE_TOKENS
    assert RoutingConfig.from_dict(config.to_dict()) == config


def test_layers_of_shallow_decoders():
    """Decisions that fall on one layer are one."""
    for layers in range(2, 9):
        config = RoutingConfig.from_tier(0.6, "two-scale", num_layers=layers)
        assert config.block_decisions <= len(config.decision_layers)
        assert abs(config.average_tokens(layers) - 0.6 * REFERENCE_TOKENS) <= 1


def test_report_says_what_blocks_do():
    report = two_scale("llava", CONFIG).report
    assert "Pools blocks of 2 x 2 visual tokens" in " ".join(str(report).split())
    assert CONFIG.kept == ("ratio 0.5, blocks first", "ratio 0.4, blocks first", "ratio 0.2")
    assert [step.name for step in report.passes if step.name == "PoolBlocks"] == ["PoolBlocks"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 1}, "block is 1; expected 0, or the edge"),
        ({"block": 2.0}, "block is 2.0; expected"),
        ({"block_decisions": 0}, r"block_decisions is 0 with block=2 and 3 decisions; expected .* 1\.\.3"),
        ({"block_decisions": 4}, r"block_decisions is 4 .* expected how many of them keep blocks, 1\.\.3"),
        ({"block": 0}, "block_decisions is 2 with block=0 .* expected 0: there are no blocks"),
        (
            {"keep_ratios": (0.5, 0.25, 0.2)},
            r"keep_ratios holds 0.25 with blocks of 2 x 2 .* more than 0.2500",
        ),
        ({"method": "nuwa", "entry_ratio": 0.5}, "block is 2 together with entry_ratio 0.5"),
    ],
)
def test_blocks_that_can_not_be_are_refused(change, message):
    fields = {**CONFIG.to_dict(), **change}
    with pytest.raises(ConfigError, match=message):
        RoutingConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})


def test_models_whose_pictures_are_no_grids_are_refused():
    llava = unrouted_model("llava").config
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                vision_config=llava.vision_config, text_config=llava.text_config, image_token_index=IMAGE
            )
        ).eval()
    with pytest.raises(UnsupportedModelError, match=r"block is 2 .* lie in their pictures is not known"):
        reroute_fx.inspect(model, config=CONFIG)


def test_more_blocks_than_tokens_to_keep_are_refused():
    config = RoutingConfig((1,), keep_tokens=(6,), method="two-scale", block=2, block_decisions=1)
    routed = two_scale("llava", config)
    routed(**batch("llava", *SINGLE))
    with pytest.raises(
        InputError, match="Row 1 has a pool with 8 blocks of 2 x 2 visual tokens, but keep_tokens"
    ):
        routed(**batch("llava", SINGLE[0], prompt(6, 31, 8, images=2)))
