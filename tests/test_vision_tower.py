"""Vision towers as programs: any number and any size of pictures, and what the model computes of them."""

import copy
import dataclasses
import itertools

import pytest
import torch
from conversations import batch, prompt, unrouted_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from suite_tiers import one, share
from tiny_models import llava_config, qwen2_vl
from transformers import LlavaForConditionalGeneration

from reroute_fx.capture.cropped_images import CroppedImages, averaged
from reroute_fx.capture.image_layout import (
    FixedImages,
    GridImages,
    SizedImages,
    TiledImages,
    encode,
)
from reroute_fx.capture.known_sizes import KnownSizes
from reroute_fx.capture.patched_images import PatchedImages
from reroute_fx.capture.segments import attend_in_segments, segments
from reroute_fx.capture.tile_packing import find_packing
from reroute_fx.capture.vision_tower import capture_vision_tower
from reroute_fx.errors import CaptureError, InputError, UnsupportedModelError
from reroute_fx.lowering import ScheduledProgram
from reroute_fx.lowering.inductor.aot_regions import load_region, package_region, schedule
from reroute_fx.lowering.onnx.onnx_program import OnnxProgram, write_onnx
from reroute_fx.lowering.regions import share_regions

pytestmark = pytest.mark.usefixtures("no_gradients")
NOISE = 1e-6
"""Of features, relative to the largest: eight roundings of float32."""


@pytest.fixture(scope="module")
def captured():
    return {family: capture_vision_tower(unrouted_model(family)) for family in ("llava", "qwen")}


def features(captured, pixels, grid):
    return captured.program.module()(**captured.images.inputs(pixels, grid))["features"]


def expect(found, expected):
    expected = torch.cat(list(expected))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= NOISE * expected.abs().max()


@pytest.fixture(scope="module")
def exact():
    return copy.deepcopy(unrouted_model("qwen")).double()


GRID = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))


@pytest.mark.full("12 s; towers of artifacts run on pictures of several sizes in test_onnx.py")
@given(st.lists(GRID, min_size=1, max_size=4), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_pictures_and_videos_of_any_size(captured, exact, grids, seed):
    """Windows of 2 x 2 tokens that fit and that don't, frames of different lengths in one call.

    Some pictures make attention so sharp that roundings grow: both are compared with double precision.
    """
    model = unrouted_model("qwen")
    grid = torch.tensor(grids) * torch.tensor([1, 2, 2])
    assume(grid.prod(dim=-1).sum() > 4)
    pixels = torch.randn(int(grid.prod(dim=-1).sum()), 96, generator=torch.Generator().manual_seed(seed))
    wanted = torch.cat(list(exact.get_image_features(pixels.double(), grid).pooler_output))
    expected = torch.cat(list(model.get_image_features(pixels, grid).pooler_output))
    noise = (expected - wanted).abs().max()
    assert noise < 1e-3
    found = features(captured["qwen"], pixels, grid)
    assert (found - wanted).abs().max() <= 3 * noise + NOISE * wanted.abs().max()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_pictures_of_one_size(captured, count):
    pixels = torch.randn(count, 3, 16, 16)
    expected = unrouted_model("llava").get_image_features(pixels).pooler_output
    expect(features(captured["llava"], pixels, None), expected)


TOWERS = ("VipLLaVA", "InternVL over Qwen2", "GOT-OCR 2", "Ovis2", "Janus", "DeepSeek-VL", "PaliGemma")


@pytest.mark.parametrize(
    "name", share(TOWERS, ["InternVL over Qwen2"], "2 s each; another tower, the same rule")
)
def test_a_tower_that_wants_pictures_of_one_size_and_nothing_else(name, benchmark_module):
    """By the model's own `get_image_features`, without its decoder."""
    model = benchmark_module("tiny_families").FAMILIES[name].build()
    captured, decoder = capture_vision_tower(model), model.get_decoder()
    assert not any(
        weight is mine for weight in captured.program.state_dict.values() for mine in decoder.parameters()
    )
    for count in (1, 3):
        pixels = torch.randn(count, 3, 16, 16)
        expected = torch.cat(list(model.base_model.get_image_features(pixel_values=pixels).pooler_output))
        assert captured.images.sizes(pixels, None) == [len(expected) // count] * count
        expect(features(captured, pixels, None), [expected])
    assert model.get_decoder() is decoder


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-1, -2, [0, -1]])
def test_feature_layers_of_the_config(strategy, layer):
    config = llava_config(2, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    model = LlavaForConditionalGeneration(config).eval()
    captured = capture_vision_tower(model)
    assert captured.images.tokens == 16 + (strategy == "full")
    pixels = torch.randn(3, 3, 16, 16)
    expect(features(captured, pixels, None), model.get_image_features(pixels).pooler_output)


def test_features_for_inner_layers_of_the_decoder():
    """And positions from a table that is stretched over each picture."""
    model = unrouted_model("qwen3")
    captured = capture_vision_tower(model)
    assert captured.images == GridImages(values=96, merge=2, patch=4, window=None, table=5)
    for grids in ([[1, 6, 4], [2, 2, 8]], [[1, 14, 10]], [[3, 4, 4]]):
        grid = torch.tensor(grids)
        pixels = torch.randn(int(grid.prod(dim=-1).sum()), 96)
        found = captured.program.module()(**captured.images.inputs(pixels, grid))
        expected = model.get_image_features(pixels, grid)
        expect(found["features"], expected.pooler_output)
        assert found["layer_features"].shape[0] == 3
        for ours, theirs in zip(found["layer_features"], expected.deepstack_features, strict=True):
            expect(ours, theirs)


def test_a_tower_without_windows():
    model = qwen2_vl()
    captured = capture_vision_tower(model)
    assert captured.images == GridImages(values=96, merge=2, patch=4, window=None)
    grid = torch.tensor([[1, 6, 4], [2, 2, 8]])
    pixels = torch.randn(int(grid.prod(dim=-1).sum()), 96)
    expect(features(captured, pixels, grid), model.get_image_features(pixels, grid).pooler_output)


def test_how_models_take_pictures(captured):
    assert captured["llava"].images == FixedImages(3, 16, 16, tokens=16)
    assert captured["qwen"].images == GridImages(values=96, merge=2, patch=4, window=16)


def test_layers_share_their_code(captured):
    """Before the layers, a layer, behind them; layers that see windows and frames are the same."""
    for each in captured.values():
        regions = share_regions(each.program.graph_module, lambda graph: graph.forward)
        assert len(regions.compiled) + len(regions.others) == 3
        assert regions.calls == len(regions.compiled) + 1  # two layers


@one("2 s each")
def test_the_model_stays_as_it_was(family):
    model = unrouted_model(family)
    before = model.config.vision_config._attn_implementation
    inputs = batch(family, prompt(7, 9, 11))
    wanted = model(**inputs).logits
    capture_vision_tower(model)
    assert model.config.vision_config._attn_implementation == before
    assert torch.equal(model(**inputs).logits, wanted)


def test_other_towers_are_refused(benchmark_module):
    model = benchmark_module("tiny_families").FAMILIES["Video-LLaMA 3"].build()
    with pytest.raises(UnsupportedModelError, match=r"VideoLlama3.*can't be exported yet.*compile works"):
        capture_vision_tower(model)


def test_a_program_that_differs_from_the_model_is_refused(monkeypatch):
    model = unrouted_model("llava")
    original = type(model).get_image_features

    def doubled(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.pooler_output = [2 * picture for picture in output.pooler_output]
        return output

    monkeypatch.setattr(type(model), "get_image_features", doubled)
    with pytest.raises(CaptureError, match="computes something else"):
        capture_vision_tower(model)


def test_segments_list_their_places():
    bounds = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    assert segments(bounds).tolist() == [[0, 1, 2], [3, -1, -1], [4, 5, -1]]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_attention_stays_in_its_segment(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 8, dtype=torch.float64)
    found, _ = attend_in_segments(None, query, key, value, None, 0.3, cu_seq_lens_q=segments(bounds))
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = (0.3 * query @ key.mT).masked_fill(segment[:, None] != segment, -torch.inf)
    expected = (scores.softmax(dim=-1) @ value).transpose(1, 2)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("times", [1, 2, 3])
def test_pictures_of_a_row_are_repeated_with_it(times):
    """Rows with two pictures, none, and one."""
    grids = torch.tensor([[1, 2, 2], [1, 2, 4], [1, 4, 4]])
    marks = torch.cat([torch.full((int(g.prod()), 96), i) for i, g in enumerate(grids)])
    images = GridImages(values=96, merge=2, patch=4, window=None)
    given = {"pixel_values": marks, "image_grid_thw": grids}
    repeated = images.repeat(given, ("pixel_values", "image_grid_thw"), [3, 0, 4], times)
    order = [*[0, 1] * times, *[2] * times]
    assert torch.equal(repeated["image_grid_thw"], grids[order])
    sizes = grids.prod(dim=-1)[order].tolist()
    assert [int(part[0, 0]) for part in repeated["pixel_values"].split(sizes)] == order
    fixed = FixedImages(3, 2, 2, tokens=4).repeat(
        {"pixel_values": torch.arange(3.0)[:, None]}, ("pixel_values", "image_grid_thw"), [8, 0, 4], times
    )
    assert fixed["pixel_values"].flatten().tolist() == order


@pytest.mark.parametrize(
    ("pixels", "grid", "match"),
    [
        ((16, 96), None, "without their grids"),
        ((16, 96), [[1, 4]], "without their grids"),
        ((12, 96), [[1, 4, 4]], r"have 16 patches of 96"),
        ((16, 90), [[1, 4, 4]], r"have 16 patches of 96"),
        ((9, 96), [[1, 3, 3]], "multiples of 2"),
        ((0, 96), [[1, 0, 4]], "multiples of 2"),
        ((4, 96), [[1, 2, 2]], "single visual token"),
    ],
)
def test_grids_have_to_fit(pixels, grid, match):
    for images in (GridImages(values=96, merge=2, patch=4, window=16), PatchedImages((96,), merge=2)):
        with pytest.raises(InputError, match=match):
            images.check(torch.zeros(pixels), None if grid is None else torch.tensor(grid))


@pytest.mark.parametrize("grid", [[[2, 4, 4]], [[1, 2, 16]]])
def test_pictures_that_tell_their_grid_by_their_shape(grid):
    with pytest.raises(InputError, match=r"expected one frame, and 4 patches or more"):
        PatchedImages((96,), merge=2).check(torch.zeros(32, 96), torch.tensor(grid))


@pytest.mark.parametrize(
    ("shape", "shapes", "match"),
    [
        ((2, 20, 96), [[4, 5], [4, 4]], r"expected \[pictures, patches, 48\]"),
        ((40, 48), [[4, 5], [4, 4]], r"expected \[pictures, patches, 48\]"),
        ((2, 20, 48), None, r"spatial_shapes are None; expected rows and columns of each of 2"),
        ((2, 20, 48), [[4, 4]], r"expected rows and columns of each of 2 pictures"),
        ((2, 20, 48), [[4, 4], [4, 6]], r"of up to 20 patches"),
        ((2, 20, 48), [[4, 4], [4, 5]], r"expected multiples of 2"),
        ((2, 20, 48), [[4, 4], [2, 8]], r"expected one frame, and 4 patches or more"),
    ],
)
def test_padded_patches_have_to_fit(shape, shapes, match):
    with pytest.raises(InputError, match=match):
        PatchedImages((48,), 2, padded=True).check(
            torch.zeros(shape), None if shapes is None else torch.tensor(shapes)
        )


@pytest.mark.parametrize("times", [1, 2])
def test_padded_patches_are_repeated_with_their_row(times):
    """Rows with two pictures, none, and one."""
    given = {
        "pixel_values": torch.arange(3.0).view(3, 1, 1).expand(3, 20, 48),
        "spatial_shapes": torch.tensor([[4, 4], [4, 5], [4, 4]]),
        "pixel_attention_mask": torch.ones(3, 20),
    }
    repeated = PatchedImages((48,), 2, padded=True).repeat(given, list(given), [9, 0, 4], times)
    order = [*[0, 1] * times, *[2] * times]
    assert repeated["pixel_values"][:, 0, 0].tolist() == order
    assert torch.equal(repeated["spatial_shapes"], given["spatial_shapes"][order])
    assert len(repeated["pixel_attention_mask"]) == len(order)


def test_sizes_that_are_known_count_like_a_tensor():
    """What models make of ``image_grid_thw``: rows, products, shares, lists, and tensors where torch needs one."""
    rows = [[1, 4, 6], [2, 8, 10]]
    known, plain = KnownSizes(rows, torch.device("cpu")), torch.tensor(rows)
    for count in (
        lambda grid: grid.tolist(),
        lambda grid: (grid.prod(-1) // 4).tolist(),
        lambda grid: (grid[:, 0] * grid[:, 1] * grid[:, 2]).tolist(),
        lambda grid: grid[:, 1:].prod(dim=1).tolist(),
        lambda grid: grid[0].prod().tolist() if isinstance(grid, torch.Tensor) else grid[0].prod(),
        lambda grid: [[int(each) for each in row] for row in grid],
        lambda grid: (len(grid), tuple(grid.shape), grid.ndim, grid.numel()),
        lambda grid: (2 * grid[:, 1] ** 2).tolist(),
        lambda grid: torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0]).tolist(),
        lambda grid: torch.nn.functional.pad(grid.prod(1).cumsum(0)[:-1], (1, 0)).tolist(),
        lambda grid: torch.split(torch.arange(184), grid.prod(1).tolist())[1].tolist(),
        lambda grid: (torch.ones(2, dtype=torch.int64) + grid[1][0]).tolist(),
    ):
        assert count(known) == count(plain)


def pictures_of(name):
    """Others than those that the tower was traced with: arguments of the model's `get_image_features`."""
    if name == "GLM-4.1V":
        grid = torch.tensor([[1, 4, 6], [1, 6, 2], [1, 2, 2]])
        return {"pixel_values": torch.randn(int(grid.prod(dim=-1).sum()), 96), "image_grid_thw": grid}
    if name in ("PaddleOCR-VL", "MiniMax M3 without blocks"):
        grid = torch.tensor([[1, 6, 14], [1, 4, 4], [1, 18, 4]])
        shape = (3, 14, 14) if name == "PaddleOCR-VL" else (96,)
        return {"pixel_values": torch.randn(int(grid.prod(dim=-1).sum()), *shape), "image_grid_thw": grid}
    if name == "LFM2-VL":
        shapes = torch.tensor([[6, 14], [4, 4], [18, 4]])
        mask = (torch.arange(90) < shapes.prod(dim=-1)[:, None]).long()
        return {
            "pixel_values": torch.randn(3, 90, 48),
            "spatial_shapes": shapes,
            "pixel_attention_mask": mask,
        }
    if name == "Mistral 3":
        sizes = torch.tensor([[16, 24], [32, 16], [16, 16]])
        return {"pixel_values": torch.randn(3, 3, 32, 24), "image_sizes": sizes}
    tiles = torch.randn(3, 2, 3, 16, 16)
    tiles[1, 1] = tiles[2] = 0
    return {"pixel_values": tiles}


EXPECTED_IMAGES = {
    "GLM-4.1V": GridImages(values=96, merge=2, patch=4, window=None, table=8, stretch="bicubic"),
    "Mistral 3": SizedImages(3, 8),
    "PaddleOCR-VL": PatchedImages((3, 14, 14), merge=2),
    "MiniMax M3 without blocks": PatchedImages((96,), merge=2),
    "LFM2-VL": PatchedImages((48,), merge=2, padded=True),
    "SmolVLM": TiledImages(3, 16, 16, tokens=4),
}


@pytest.mark.parametrize(
    "name", share(EXPECTED_IMAGES, ["Mistral 3", "PaddleOCR-VL"], "3 s each to capture a tower")
)
def test_towers_that_know_more_than_patches(benchmark_module, name):
    torch.manual_seed(5)
    model, given = benchmark_module("tiny_families").FAMILIES[name].build(), pictures_of(name)
    captured = capture_vision_tower(model)
    assert captured.images == EXPECTED_IMAGES[name]
    pixels = given["pixel_values"]
    grids = (given[each] for each in ("image_grid_thw", "image_sizes", "spatial_shapes") if each in given)
    grid = next(grids, None)
    captured.images.check(pixels, grid)
    found = encode(captured.program.module(), captured.images, pixels, grid)["features"]
    expected = [part.flatten(0, -2) for part in model.get_image_features(**given).pooler_output if len(part)]
    assert captured.images.sizes(pixels, grid) == [*map(len, expected), *([0] if name == "SmolVLM" else [])]
    # Weights are ten times what is usual, and roundings grow with them.
    off = (found - torch.cat(expected)).abs().max() / torch.cat(expected).abs().max()
    assert off <= 100 * torch.finfo(torch.float32).eps


RESOLUTIONS = [[16, 32], [32, 16], [32, 32], [48, 16], [64, 64]]
TILED = {
    "LLaVA-NeXT": CroppedImages(3, 16, 4, tuple(map(tuple, RESOLUTIONS))),
    "LLaVA-NeXT-Video": CroppedImages(3, 16, 4, tuple(map(tuple, RESOLUTIONS))),
    "LLaVA-OneVision": CroppedImages(3, 16, 4, tuple(map(tuple, RESOLUTIONS)), most=9, takes_videos=True),
}


def of_tiles(benchmark_module, name):
    family = benchmark_module("tiny_families").FAMILIES[name]
    return dataclasses.replace(family, more={**family.more, "image_grid_pinpoints": RESOLUTIONS}).build()


def tiles_of(sizes, images):
    """Pictures of such sizes, as a processor returns them: with tiles of zeros behind those of small ones."""
    grid = torch.tensor(sizes)
    pixels = torch.randn(len(sizes), max(images.tiles_of(grid)), 3, 16, 16)
    for picture, count in zip(pixels, images.tiles_of(grid), strict=True):
        picture[count:] = 0
    return pixels, grid


@pytest.mark.parametrize("name", share(TILED, ["LLaVA-OneVision"], "3 s each; the same rule"))
def test_tiles_are_laid_out_as_in_their_picture(name, benchmark_module):
    """Wide, tall, square, more cells than are kept, and less than a tile."""
    model = of_tiles(benchmark_module, name)
    captured = capture_vision_tower(model)
    assert captured.images == TILED[name]
    run = captured.program.module()
    for sizes in ([[40, 30], [100, 100], [17, 90]], [[64, 5]], [[3, 2], [16, 32]]):
        pixels, grid = tiles_of(sizes, captured.images)
        captured.images.check(pixels, grid)
        expected = model.get_image_features(pixels, image_sizes=grid).pooler_output
        assert captured.images.sizes(pixels, grid) == [*map(len, expected)]
        expect(encode(run, captured.images, pixels, grid)["features"], expected)
    if captured.images.takes_videos:
        frames = torch.randn(2, 5, 3, 16, 16)
        expected = model.get_video_features(frames).pooler_output
        assert captured.images.sizes(frames, None) == [*map(len, expected)] == [21, 21]
        expect(encode(run, captured.images, frames, None)["features"], expected)


@pytest.mark.parametrize(
    ("name", "edge", "resolutions", "most", "tokens"),
    [
        ("LLaVA-NeXT", 336, [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], None, 2340),
        ("LLaVA-OneVision", 384, list(itertools.product(range(384, 2305, 384), repeat=2)), 9, 2929),
    ],
)
def test_tiles_of_published_sizes(name, edge, resolutions, most, tokens, benchmark_module):
    family = benchmark_module("tiny_families").FAMILIES[name]
    vision = {**family.more["vision_config"], "image_size": edge, "patch_size": 14}
    more = {
        **family.more,
        "vision_config": vision,
        "image_grid_pinpoints": [list(each) for each in resolutions],
    }
    found = find_packing(dataclasses.replace(family, more=more).build())
    assert (found.most, found.takes_videos) == (most, name == "LLaVA-OneVision")
    assert found.sizes(torch.zeros(1, 5), torch.tensor([[480, 640]])) == [tokens]


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda features: features, False),
        (lambda features: [each.flip(0) for each in features], True),
        (lambda features: [each[:-1] for each in features], True),
    ],
    ids=["same", "other order", "no last newline"],
)
def test_tiles_that_are_laid_out_in_another_way_are_refused(change, refused, benchmark_module, monkeypatch):
    """The model's own code is asked, whatever it is called."""
    model = of_tiles(benchmark_module, "LLaVA-NeXT")
    original = type(model.model).pack_image_features

    def changed(self, *args, **kwargs):
        features, lengths = original(self, *args, **kwargs)
        return change(features), lengths

    monkeypatch.setattr(type(model.model), "pack_image_features", changed)
    if refused:
        with pytest.raises(UnsupportedModelError, match=r"LlavaNext.*image_newline.*in another way.*compile"):
            find_packing(model)
    else:
        assert find_packing(model) == TILED["LLaVA-NeXT"]


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.tuples(st.integers(1, 9), st.integers(1, 9)))
@settings(max_examples=30, deadline=None)
def test_averaged_cells_are_what_interpolation_makes(size, wanted):
    values = torch.rand(size)
    places, weights = averaged(torch.arange(values.numel()).view(size), *wanted)
    expected = torch.nn.functional.interpolate(values[None, None], wanted, mode="bilinear")[0, 0]
    assert ((values.flatten()[places] * weights).sum(dim=-1) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("shape", "sizes", "match"),
    [
        ((2, 3, 16, 16), [[16, 16], [16, 16]], r"expected \[pictures, tiles, 3, 16, 16\]"),
        ((2, 3, 3, 16, 8), [[16, 16], [16, 16]], r"expected \[pictures, tiles, 3, 16, 16\]"),
        ((2, 3, 3, 16, 16), None, r"image_sizes are None; expected \[2, 2\]"),
        ((2, 3, 3, 16, 16), [[16, 16]], r"expected \[2, 2\]"),
        ((1, 3, 3, 16, 16), [[0, 16]], r"expected \[1, 2\]"),
        ((1, 3, 3, 16, 16), [[64, 64]], r"has 3 tiles of each picture, .* have up to 17"),
    ],
)
def test_tiles_have_to_fit_sizes(shape, sizes, match):
    with pytest.raises(InputError, match=match):
        TILED["LLaVA-NeXT"].check(torch.zeros(shape), None if sizes is None else torch.tensor(sizes))


@pytest.mark.parametrize("times", [1, 3])
def test_tiles_with_sizes_are_repeated_with_their_row(times):
    """Rows with two pictures that came whole, none, and one that was cut."""
    images = TILED["LLaVA-NeXT"]
    given = {
        "pixel_values": torch.arange(3.0).view(3, 1, 1, 1, 1),
        "image_sizes": torch.tensor([[16, 16], [16, 24], [40, 30]]),
        "batch_num_images": torch.tensor([2, 1]),
    }
    tokens = [34, 0, images.sizes(given["pixel_values"], given["image_sizes"])[2]]
    repeated = images.repeat(given, list(given), tokens, times)
    order = [*[0, 1] * times, *[2] * times]
    assert repeated["pixel_values"].flatten().tolist() == order
    assert torch.equal(repeated["image_sizes"], given["image_sizes"][order])
    assert repeated["batch_num_images"].tolist() == [*[2] * times, *[1] * times]


def ahead_of_time(program, folder):
    parts, regions = schedule(program), []
    for i, region in enumerate(parts.regions):
        path = folder / f"{i}.pt2"
        path.write_bytes(package_region(region, torch.device("cpu")))
        regions.append(load_region(path, torch.device("cpu")))
    return ScheduledProgram(parts.schedule, regions, {**program.state_dict, **program.constants})


def as_onnx(program, folder):
    return OnnxProgram(write_onnx({"images": program}, folder)["images"]).run


@pytest.mark.full("25 s to 60 s each; a new kind of tower, the same lowering")
@pytest.mark.parametrize("write", [as_onnx, ahead_of_time])
@pytest.mark.parametrize("name", ["LLaVA-OneVision", "PaddleOCR-VL"])
def test_compiled_towers_take_pictures_of_other_sizes(name, write, benchmark_module, tmp_path):
    """As exactly as the model's own features in float32 are those in double precision, up to a factor."""
    torch.manual_seed(5)
    if name in TILED:
        model = of_tiles(benchmark_module, name)
        pixels, grid = tiles_of([[40, 30], [100, 100], [17, 90]], TILED[name])
        given = {"pixel_values": pixels, "image_sizes": grid}
    else:
        model = benchmark_module("tiny_families").FAMILIES[name].build()
        given = pictures_of(name)
        pixels, grid = given.values()
    expected = torch.cat(list(model.get_image_features(**given).pooler_output))
    captured = capture_vision_tower(model)
    found = encode(write(captured.program, tmp_path), captured.images, pixels, grid)["features"]
    given["pixel_values"] = pixels.double()
    exact = torch.cat(list(model.double().get_image_features(**given).pooler_output))
    assert (found - exact).abs().max() <= 4 * (expected - exact).abs().max()


@pytest.mark.parametrize(
    ("shape", "sizes", "match"),
    [
        ((2, 16, 16), [[16, 16], [16, 16]], r"expected \[pictures, 3, height, width\]"),
        ((2, 4, 16, 16), [[16, 16], [16, 16]], r"expected \[pictures, 3, height, width\]"),
        ((2, 3, 16, 16), None, "image_sizes has shape None"),
        ((2, 3, 16, 16), [[16, 16]], r"image_sizes has shape \[1, 2\]"),
        ((1, 3, 16, 16), [[16, 12]], "multiples of 8"),
        ((1, 3, 16, 16), [[8, 16]], "multiples of 8, two or more"),
        ((1, 3, 16, 16), [[16, 24]], r"within the \[16, 16\]"),
    ],
)
def test_sizes_have_to_fit(shape, sizes, match):
    with pytest.raises(InputError, match=match):
        SizedImages(3, 8).check(torch.zeros(shape), None if sizes is None else torch.tensor(sizes))


@pytest.mark.parametrize("times", [1, 3])
def test_sizes_and_tiles_are_repeated_with_their_row(times):
    sizes = torch.tensor([[16, 16], [16, 24], [32, 16]])
    given = {"pixel_values": torch.arange(3.0)[:, None], "image_sizes": sizes}
    repeated = SizedImages(3, 8).repeat(given, list(given), [10, 0, 8], times)
    order = [*[0, 1] * times, *[2] * times]
    assert repeated["pixel_values"].flatten().tolist() == order
    assert torch.equal(repeated["image_sizes"], sizes[order])
    tiles = TiledImages(3, 8, 8, tokens=4)
    rows = tiles.repeat({"pixel_values": torch.arange(2.0)[:, None]}, ["pixel_values"], [4, 4], times)
    assert rows["pixel_values"].flatten().tolist() == [*[0] * times, *[1] * times]
    for wrong in (torch.ones(2, 3, 8, 8), torch.ones(2, 1, 3, 8, 16), torch.zeros(2, 1, 3, 8, 8)):
        with pytest.raises(InputError, match=r"expected \[batch, tiles, 3, 8, 8\], not all of them zeros"):
            tiles.check(wrong, None)
