"""Tokens lie on the picture where the model saw them."""

import numpy as np
import pytest
import torch
from suite_tiers import one
from tiny_models import collate, llava_image, make_row, qwen_picture, tiny_llava, tiny_qwen
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import reroute_fx
from reroute_fx.errors import InputError, UnsupportedModelError
from reroute_fx.loading.sample_picture import picture
from reroute_fx.visualizing.views import view_rows
from reroute_fx.visualizing.visualize import find_boxes

SHARE = 0.5


@pytest.fixture(scope="module", params=["compact_route_stagewise", "physical_delete"])
def llava(request):
    return reroute_fx.compile(tiny_llava(), SHARE, action=request.param, backend="eager")


def rows_of(*images):
    random = torch.Generator().manual_seed(5)
    return [
        make_row(random, [2] * count + [3], [llava_image(random) for _ in range(count)]) for count in images
    ]


@one("3 s each")
def test_stages_are_what_was_selected(llava):
    inputs = collate(llava, rows_of(1, 2))
    with torch.no_grad():
        routing = llava(**inputs).routing
    first, second = view_rows(llava.config, inputs, routing)
    assert [len(first), len(second)] == [1, 2]
    layers = llava.routing_config.decision_layers
    before = np.ones((4, 8), dtype=bool)
    for number, layer in enumerate(layers):
        stages = [view.stages[number] for view in second]
        kept = np.concatenate([stage.kept.reshape(-1) for stage in stages])
        assert kept.tolist() == routing.all_kept[layer][1].tolist()
        assert kept.sum() == len(routing.selected[layer][1])
        back = np.concatenate([stage.returned.reshape(-1) for stage in stages])
        assert back.tolist() == (kept & ~before.reshape(-1)[: len(kept)]).tolist()
        assert stages[0].first_layer == layer
        before = kept
    assert [stage.last_layer + 1 for stage in first[0].stages] == [*layers[1:], 8]


@pytest.mark.full("11 s; the stages of deleting are compared in the gate")
def test_deleted_tokens_have_no_score_and_never_come_back():
    llava = reroute_fx.compile(tiny_llava(), SHARE, action="physical_delete", backend="eager")
    inputs = collate(llava, rows_of(1))
    with torch.no_grad():
        routing = llava(**inputs).routing
    ((view,),) = view_rows(llava.config, inputs, routing)
    assert view.deletes
    for earlier, later in zip(view.stages, view.stages[1:], strict=False):
        assert not later.returned.any()
        assert (np.isnan(later.scores) == ~earlier.kept).all()


def test_a_llava_picture_is_what_the_processor_made():
    llava = reroute_fx.compile(tiny_llava(), SHARE, backend="eager")
    inputs = collate(llava, rows_of(1))
    colours = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    inputs["pixel_values"] = ((colours - mean[:, None, None]) / std[:, None, None])[None]

    class Processor:
        class image_processor:
            image_mean, image_std = mean.tolist(), std.tolist()

    with torch.no_grad():
        routing = llava(**inputs).routing
    ((view,),) = view_rows(llava.config, inputs, routing, Processor)
    assert view.picture == pytest.approx(colours.permute(1, 2, 0).numpy() * 255, abs=0.51)


@pytest.mark.full("4 s")
def test_a_qwen_picture_is_put_together_from_its_patches():
    """Patches come in groups of 2 x 2, each token one group."""
    qwen = reroute_fx.compile(tiny_qwen(), SHARE, backend="eager")
    image = picture(2, (28 * 6, 28 * 4))
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 100)
    pixels = processor(images=[image], return_tensors="pt")
    random = torch.Generator().manual_seed(0)
    inputs = collate(qwen, [make_row(random, [2, 3], [qwen_picture(random, (1, 8, 12))])])
    inputs["pixel_values"] = pixels["pixel_values"]
    assert inputs["image_grid_thw"].tolist() == pixels["image_grid_thw"].tolist()
    with torch.no_grad():
        routing = qwen(**inputs).routing
    ((view,),) = view_rows(qwen.config, inputs, routing)
    assert view.picture == pytest.approx(np.asarray(image).astype(float), abs=0.51)
    assert view.stages[0].kept.shape == (4, 6)


def test_pictures_with_other_tokens_than_patches_are_refused(llava):
    inputs = collate(llava, rows_of(1))
    with torch.no_grad():
        routing = llava(**inputs).routing
    with pytest.raises(UnsupportedModelError, match=r"\[64\] merged patches and \[16\] visual tokens"):
        view_rows(llava.config, {**inputs, "pixel_values": torch.zeros(1, 3, 32, 32)}, routing)
    with pytest.raises(UnsupportedModelError, match="pixel_values has 5 dimensions"):
        view_rows(llava.config, {**inputs, "pixel_values": torch.zeros(1, 1, 3, 16, 16)}, routing)


@pytest.mark.parametrize(
    ("answer", "boxes"),
    [
        ("[0.10, 0.20, 0.50, 1.00]", [(10, 40, 50, 200)]),
        ('```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "cat"}]', [(10, 20, 30, 40)]),
        ("(1,2,3,4) and [0,0,1,1]", [(1, 2, 3, 4), (0, 0, 100, 200)]),
        ("It is red.", []),
    ],
)
def test_boxes_of_an_answer(answer, boxes):
    assert find_boxes(answer, 100, 200) == boxes


def test_videos_and_text_are_refused(llava, tmp_path):
    inputs = collate(llava, rows_of(1))
    del inputs["pixel_values"]
    with pytest.raises(InputError, match="inputs hold no pixel_values"):
        llava.visualize(inputs, tmp_path)
    with pytest.raises(InputError, match="expected pictures only"):
        llava.visualize({**inputs, "pixel_values_videos": torch.zeros(1)}, tmp_path)
    assert not list(tmp_path.iterdir())
