"""Nüwa on pictures of any size, against a plain spelling of the official code for one image."""

import math
from dataclasses import replace

import pytest
import torch
from suite_tiers import share as share_cases
from tiny_models import IMAGE, START, VIDEO, qwen2_vl, qwen_config, sharp
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

import reroute_fx
from reroute_fx import InputError, MatchError, RoutingConfig, UnsupportedModelError
from reroute_fx.capture.vision_tower import capture_vision_tower
from reroute_fx.lowering import lower
from reroute_fx.lowering.onnx.onnx_program import OnnxProgram, write_onnx
from reroute_fx.methods.nuwa import reduce_grid
from reroute_fx.passes import (
    CanonicalizeAttention,
    FindStates,
    GridInputs,
    ReduceGrids,
    run_passes,
    to_program,
)
from reroute_fx.pipeline import reduce_tower

GRIDS = torch.tensor([[1, 8, 10], [1, 6, 14], [1, 12, 12]])
"""Of patches: even and odd grids of 4 x 5, 3 x 7 and 6 x 6 features."""
DEPTH = 26
NAMES = GridInputs("frames", "position_ids", "window_order", "feature_frames", "feature_counts")


def tower_config(**vision):
    given = {"depth": DEPTH, "fullatt_block_indexes": [7, 15, 25], "window_size": 16, "patch_size": 4}
    return qwen_config(8, tokens_per_second=4, **{**given, **vision})


@pytest.fixture(scope="module")
def model():
    return sharp(Qwen2_5_VLForConditionalGeneration, tower_config())


@pytest.fixture(scope="module")
def tower(model):
    return capture_vision_tower(model)


@pytest.fixture(scope="module")
def small():
    """A tower of two layers: the first sees windows."""
    given = {"window_size": 16, "patch_size": 4, "fullatt_block_indexes": [1]}
    return capture_vision_tower(sharp(Qwen2_5_VLForConditionalGeneration, qwen_config(2, **given)))


@pytest.fixture(scope="module")
def routed(model, tower):
    """Compiled for a tier that decides, or for one where only stage 1 does something."""
    made = {}

    def at(action):
        if action not in made:
            decided = {"method": "nuwa", "tier": 0.25, "action": action}
            options = {"config": config(0.35)} if action == "enter" else decided
            with pytest.MonkeyPatch.context() as patch:
                # Its 26 layers are captured once.
                patch.setattr("reroute_fx.api.capture_vision_tower", lambda _: tower)
                made[action] = reroute_fx.compile(model, backend="eager", **options)
        return made[action]

    return at


@pytest.fixture(scope="module")
def pictures():
    torch.manual_seed(3)
    return [torch.randn(int(grid.prod()), 96) for grid in GRIDS]


def config(share):
    """What enters; nothing is decided that changes anything."""
    return RoutingConfig((4,), (1.0,), "physical_delete", "nuwa", entry_ratio=share)


class Watched:
    """What the tower's own modules compute for one picture."""

    def __init__(self, visual, pixels, grid):
        self.outputs, handles = [], []
        for block in visual.blocks:
            handles.append(block.register_forward_hook(lambda _, __, out: self.outputs.append(out)))
        handles.append(visual.blocks[-1].attn.register_forward_pre_hook(self._enter, with_kwargs=True))
        self.features = visual(pixels, grid_thw=grid[None]).pooler_output
        for handle in handles:
            handle.remove()
        self.order, _ = get_vision_window_index(grid[None], 2, visual.config.window_size, 4)
        self.compared = visual.merger(torch.stack(self.outputs[7:24]).mean(0))[self.order.argsort()]
        self.received = self._received(visual.blocks[-1].attn)

    def _enter(self, _, args, kwargs):
        self.hidden, self.rotary = (args or [kwargs["hidden_states"]])[0], kwargs["position_embeddings"]

    def _received(self, attention):
        """The whole map of the last layer; columns of it, by feature."""
        query, key, _ = attention.qkv(self.hidden).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *self.rotary)
        weights = torch.einsum("ihd,jhd->hij", query, key) / math.sqrt(query.shape[-1])
        by_patch = weights.softmax(dim=-1).mean(dim=0).sum(dim=0)
        return by_patch.view(-1, 4).mean(dim=-1)[self.order.argsort()]


def official(watched, grid, share, most):
    """Which features stay, and what they become: loops over regions and features."""
    high, wide = (int(size) // 2 for size in grid[1:])
    metric, tokens = watched.received, high * wide
    regions = {}
    for token in range(tokens):
        regions.setdefault((token // wide // 2, token % wide // 2), []).append(token)
    candidates = [
        t for inside in regions.values() for t in sorted(inside, key=lambda t: -float(metric[t]))[:most]
    ]
    best = sorted(candidates, key=lambda t: -float(metric[t]))[: math.ceil(tokens * share)]
    kept = sorted(best)
    pillar = torch.quantile(metric[kept], 0.1)
    even = [size + size % 2 for size in (high, wide)]
    reach = 0.8 * math.hypot(even[0] - 1, even[1] - 1)
    rows = []
    for token in kept:
        weights = torch.zeros(tokens)
        for other in range(tokens):
            if metric[token] >= pillar and other != token:
                continue
            apart = math.dist(divmod(token, wide), divmod(other, wide))
            alike = torch.cosine_similarity(watched.compared[token], watched.compared[other], dim=0)
            weights[other] = alike.clamp(min=0) * max(0.0, 1 - apart / reach)
        rows.append((weights / (weights.sum() + 1e-8)) @ watched.features)
    return kept, torch.stack(rows)


@pytest.mark.full("23 s; captures a tower of 26 layers")
@pytest.mark.parametrize(
    ("share", "most"),
    [(0.35, 3), (0.85, 4)],
)
@torch.no_grad()
def test_features_are_those_of_the_official_code(share, most, model, tower, pictures):
    reduced = reduce_tower(tower, DEPTH, config(share))
    inputs = reduced.images.inputs(torch.cat(pictures), GRIDS)
    found = reduced.program.module()(**inputs)["features"].split(
        reduced.images.sizes(torch.cat(pictures), GRIDS)
    )
    mixed = 0
    for pixels, grid, features in zip(pictures, GRIDS, found, strict=True):
        watched = Watched(model.model.visual, pixels, grid)
        kept, wanted = official(watched, grid, share, most)
        stays = features.isfinite().all(dim=1)
        assert stays.nonzero().flatten().tolist() == kept
        assert torch.equal(features[~stays], torch.full_like(features[~stays], -torch.inf))
        assert len(kept) == config(share).entering(len(features)) == math.ceil(len(features) * share)
        scale = watched.features.abs().max()
        torch.testing.assert_close(features[stays] / scale, wanted / scale, rtol=0, atol=2e-5)
        mixed += int(((wanted - watched.features[kept]).abs().amax(dim=1) > 1e-2 * scale).sum())
    # At least one of each picture takes in others.
    assert mixed >= len(GRIDS)


def reduce_small(small, rule=reduce_grid, names=NAMES):
    passes = [FindStates(2), CanonicalizeAttention(), ReduceGrids(rule, 0.6, slice(1, 3), 2, names)]
    graph, _ = run_passes(small.program, passes)
    return to_program(graph, small.program, as_original=True)


@pytest.mark.full("66 s; test_nuwa.py compiles a reduced tower, and exports one again")
def test_the_tower_compiles_and_exports_again(small, pictures):
    reduced, images = reduce_small(small), replace(small.images, share=0.6)
    compiled, program = lower(reduced, name="images"), reduced.module()
    again = torch.export.export(program, (), images.inputs(torch.cat(pictures), GRIDS)).module()
    for chosen in ([0, 1, 2], [2], [1, 0]):
        pixels, grid = torch.cat([pictures[i] for i in chosen]), GRIDS[chosen]
        inputs = images.inputs(pixels, grid)
        with torch.no_grad():
            expected = program(**inputs)["features"]
            found = compiled(**inputs)["features"]
            if len(chosen) == len(GRIDS):
                assert torch.equal(again(**inputs)["features"], expected)
        assert torch.equal(found.isfinite(), expected.isfinite())
        stays = expected.isfinite()
        torch.testing.assert_close(found[stays], expected[stays], rtol=1e-4, atol=1e-4)


@pytest.mark.full("6 s; captures another tower")
@torch.no_grad()
def test_a_tower_without_windows(pictures):
    """Its layers run in the order of the features, with no input that says so."""
    model = qwen2_vl()
    tower = capture_vision_tower(model)
    reduced = reduce_small(tower, names=replace(NAMES, order=None))
    images, pixels = replace(tower.images, share=0.6), torch.cat(pictures)
    found = reduced.module()(**images.inputs(pixels, GRIDS))["features"]
    whole = model.model.visual(pixels, grid_thw=GRIDS).pooler_output
    for part, unchanged in zip(
        *(each.split(images.sizes(pixels, GRIDS)) for each in (found, whole)), strict=True
    ):
        stays = part.isfinite().all(dim=1)
        assert stays.sum() == math.ceil(0.6 * len(part))
        # All but the least tenth are as they were.
        same = (part[stays] - unchanged[stays]).abs().amax(dim=1) < 1e-5
        assert same.float().mean() > 0.75
        assert not same.all()


@pytest.mark.full("28 s; the rule itself is written as ONNX in test_nuwa.py")
def test_the_tower_as_onnx(small, pictures, tmp_path):
    reduced = reduce_small(small)
    write_onnx({"images": reduced}, tmp_path)
    inputs = replace(small.images, share=0.6).inputs(torch.cat(pictures[:2]), GRIDS[:2])
    found, expected = (
        OnnxProgram(tmp_path / "images.onnx").run(**inputs)["features"],
        reduced.module()(**inputs)["features"],
    )
    stays = expected.isfinite()
    assert torch.equal(found.isfinite(), stays)
    torch.testing.assert_close(found[stays], expected[stays], rtol=1e-4, atol=1e-4)


def prompt(*pictures):
    """Text, pictures between text, text."""
    ids, grids, pixels = [5, 6], [], []
    for grid, patches in pictures:
        ids += [START, *[IMAGE] * (int(grid.prod()) // 4), 11, 7]
        grids.append(grid)
        pixels.append(patches)
    ids = torch.tensor([[*ids, 8, 9]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.stack(grids),
    }


@pytest.mark.full("captures a tower of 26 layers")
@torch.no_grad()
def test_what_is_left_enters_with_its_own_positions(model, routed, pictures):
    """Against the original decoder on the rows that are left."""
    routed = routed("enter")
    inputs = prompt((GRIDS[0], pictures[0]), (GRIDS[2], pictures[2]))
    output = routed(**inputs)
    ids, inner = inputs["input_ids"], model.model
    features = torch.cat(list(routed.get_image_features(inputs["pixel_values"], GRIDS[[0, 2]]).pooler_output))
    embeds = inner.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = features
    stays = embeds[0].isfinite().all(dim=1)
    assert torch.equal(output.routing.entered[0], stays[ids[0] == IMAGE].nonzero().flatten())
    positions, _ = inner.get_rope_index(
        ids, image_grid_thw=GRIDS[[0, 2]], mm_token_type_ids=inputs["mm_token_type_ids"]
    )
    wanted = inner.language_model(
        inputs_embeds=embeds[:, stays], position_ids=positions[..., stays], use_cache=False
    ).last_hidden_state
    torch.testing.assert_close(output.logits[0, stays], model.lm_head(wanted)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.full("5 s")
@pytest.mark.parametrize(
    "action",
    share_cases(["physical_delete", "compact_route_stagewise"], ["compact_route_stagewise"], "5 s each"),
)
@torch.no_grad()
def test_rows_of_a_batch_are_the_rows_alone(action, routed, pictures):
    routed = routed(action)
    rows = [
        prompt((GRIDS[0], pictures[0])),
        prompt((GRIDS[1], pictures[1]), (GRIDS[2], pictures[2])),
    ]
    width = max(row["input_ids"].shape[1] for row in rows)
    pad = [width - row["input_ids"].shape[1] for row in rows]
    together = {
        name: torch.cat(
            [torch.nn.functional.pad(row[name], (n, 0)) for n, row in zip(pad, rows, strict=True)]
        )
        for name in ("input_ids", "mm_token_type_ids")
    }
    together |= {name: torch.cat([row[name] for row in rows]) for name in ("pixel_values", "image_grid_thw")}
    together["attention_mask"] = torch.stack([(torch.arange(width) >= n).long() for n in pad])
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    output, tokens = routed(**together), routed.generate(**together, **options)
    for i, row in enumerate(rows):
        alone = routed(**row)
        assert torch.equal(output.routing.entered[i], alone.routing.entered[0])
        for layer, kept in alone.routing.selected.items():
            assert torch.equal(output.routing.selected[layer][i], kept[0])
        assert output.routing.kv_lengths[i] == alone.routing.kv_lengths[0]
        torch.testing.assert_close(output.logits[i, -1], alone.logits[0, -1], rtol=1e-4, atol=1e-4)
        assert tokens[i, -4:].tolist() == routed.generate(**row, **options)[0, -4:].tolist()


@pytest.mark.parametrize("action", ["physical_delete", "compact_route_stagewise"])
def test_shares_are_those_of_the_authors(action):
    for tier, entering, last in ((0.25, 0.35, 0.15), (0.5, 0.6, 0.4), (0.75, 0.85, 0.65)):
        made = RoutingConfig.from_tier(tier, "nuwa", action, num_layers=28, grids=True)
        assert made.decision_layers[0] == 14
        assert made.entering(1000) / 1000 == pytest.approx(entering, abs=2e-3)
        assert made.entering(1000) * made.keep_ratios[-1] / 1000 == pytest.approx(last, abs=2e-3)
    paper = RoutingConfig.from_tier(0.75, "nuwa", "physical_delete", "paper", num_layers=28, grids=True)
    assert (paper.entry_ratio, paper.keep_ratios) == (0.85, (0.7,))


@pytest.mark.parametrize("layers", [16, 28, 32])
@pytest.mark.parametrize("action", ["physical_delete", "compact_route"])
@pytest.mark.parametrize("tier", [192, 128, 64])
def test_averages_are_the_tier(tier, action, layers):
    made = RoutingConfig.from_tier(tier, "nuwa", action, num_layers=layers, grids=True)
    assert abs(made.average_tokens(layers) - tier) <= 1


def test_shallow_towers_are_refused():
    shallow = Qwen2_5_VLForConditionalGeneration(tower_config(depth=20)).eval()
    with pytest.raises(UnsupportedModelError, match="20 layers, but hidden states up to layer 24"):
        reroute_fx.inspect(shallow, 128, method="nuwa")


@pytest.mark.full("4 s; captures another tower")
def test_a_last_layer_of_windows_is_refused(small):
    with pytest.raises(MatchError, match="The last layer of the tower attends in segments"):
        reduce_small(small, names=replace(NAMES, frames="windows"))


@pytest.mark.parametrize(
    "rule",
    [
        lambda tower: (tower.received > 0, tower.features[:, 0]),
        lambda tower: (tower.received, tower.features),
        lambda tower: tower.features,
    ],
    ids=["vectors", "scores", "one"],
)
def test_rules_that_return_something_else_are_named(rule, small):
    with pytest.raises(MatchError, match="The reduction"):
        reduce_small(small, rule)


@pytest.mark.full("captures a tower of 26 layers")
def test_videos_are_refused(routed, pictures):
    ids = torch.tensor([[5, START, *[VIDEO] * 20, 7, 8]])
    video = {"pixel_values_videos": pictures[0], "video_grid_thw": GRIDS[:1]}
    with pytest.raises(InputError, match="pixel_values_videos were given, but method 'nuwa' reduces images"):
        routed("enter")(input_ids=ids, **video)
