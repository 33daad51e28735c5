"""What processors of other families call pictures and videos, and how many tokens each has."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import IMAGE, TEXT, VIDEO, VISION
from transformers import (
    CLIPVisionConfig,
    Gemma3nTextConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
)

import reroute_fx
from reroute_fx import RoutingConfig, UnsupportedModelError
from reroute_fx.capture import tokens_per_image
from reroute_fx.capture.visual_tokens import name_videos
from reroute_fx.runtime.call_checks import has_features
from reroute_fx.runtime.row_images import split_images

ROUTING = RoutingConfig((1,), (0.5,))
ROPE = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


def config(**vision):
    return SimpleNamespace(
        model_type="any",
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_config=SimpleNamespace(**vision),
    )


def test_grids_tell_the_tokens_where_it_is_known_how_many_patches_are_merged():
    given = {"pixel_values": torch.ones(48, 3), "image_grid_thw": torch.tensor([[1, 4, 4], [2, 4, 4]])}
    assert tokens_per_image(config(spatial_merge_size=2), given) == {IMAGE: [4, 8]}
    # Kimi K2.5 and Video-LLaMA 3 say it elsewhere: a picture is a run of placeholders then.
    assert tokens_per_image(config(merge_kernel_size=(2, 2)), given) == {}


def test_rows_of_text_beside_rows_with_pictures_use_no_picture_up():
    """SmolVLM encodes the pictures of each row, those without any too."""
    features = [torch.ones(3, 8), torch.ones(0, 8), torch.ones(2, 8)]
    encoded = {"mm_encoder_outputs": {"image": SimpleNamespace(pooler_output=features)}}
    sizes = tokens_per_image(config(), encoded)
    assert sizes == {IMAGE: [3, 2]}
    ids = torch.tensor([[1, IMAGE, IMAGE, IMAGE, 7], [1, 5, 6, 7, 8], [1, 7, IMAGE, IMAGE, 9]])
    assert split_images(ids, ids == IMAGE, sizes) == [[(IMAGE, 3)], [], [(IMAGE, 2)]]


def test_frames_with_placeholders_of_images_are_told_by_the_types_of_tokens():
    """GLM-4V: an image of 2 tokens, then a video of two frames of 2 tokens with text between them."""
    ids = torch.tensor([[1, IMAGE, IMAGE, 7, IMAGE, IMAGE, 8, IMAGE, IMAGE, 9]])
    types = torch.tensor([[0, 1, 1, 0, 2, 2, 0, 2, 2, 0]])
    given = {"pixel_values_videos": torch.ones(1), "mm_token_type_ids": types}
    named = name_videos(config(), ids, given)
    assert named.tolist() == [[1, IMAGE, IMAGE, 7, VIDEO, VIDEO, 8, VIDEO, VIDEO, 9]]
    sizes = {IMAGE: [2], VIDEO: [4]}
    assert split_images(named, (named == IMAGE) | (named == VIDEO), sizes) == [[(IMAGE, 2), (VIDEO, 4)]]


@pytest.mark.parametrize("missing", ["pixel_values_videos", "mm_token_type_ids"])
def test_without_a_video_or_types_placeholders_stay_as_they_are(missing):
    ids = torch.tensor([[1, IMAGE, IMAGE, 7]])
    given = {"pixel_values_videos": torch.ones(1), "mm_token_type_ids": torch.tensor([[0, 2, 2, 0]])}
    del given[missing]
    assert torch.equal(name_videos(config(), ids, given), ids)


def test_video_llavas_name_for_pictures_is_known():
    assert has_features({"pixel_values_images": torch.ones(1)})
    assert not has_features({"pixel_values_images": None, "attention_mask": torch.ones(1)})


def mllama():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [0],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {
        **TEXT,
        "num_hidden_layers": 2,
        "cross_attention_layers": [1],
        "rope_parameters": rope,
        "pad_token_id": 0,
    }
    return MllamaForConditionalGeneration(MllamaConfig(text_config=text, vision_config=vision))


def llama_4():
    text = {
        **TEXT,
        "head_dim": 8,
        "num_hidden_layers": 2,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
    }
    vision = {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    return Llama4ForConditionalGeneration(
        Llama4Config(text_config=text | {"pad_token_id": 0}, vision_config=vision, image_token_index=IMAGE)
    )


def llava(**rope):
    text = LlamaConfig(**TEXT, num_hidden_layers=2, rope_parameters={**ROPE, **rope})
    vision = CLIPVisionConfig(**VISION)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )


def gemma_3n():
    sizes = {"intermediate_size": 64, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 2}
    small = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "num_kv_shared_layers": 0}
    text = Gemma3nTextConfig(**TEXT | sizes | small, num_hidden_layers=2, head_dim=8)
    vision = CLIPVisionConfig(**VISION)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )


REFUSED = {
    "several streams": (
        gemma_3n,
        r"several residual streams, which each of its layers mixes \(layers\.0\.altup\)",
    ),
    "cross-attention": (mllama, r"reads pictures by cross-attention \(layers\.1\.cross_attn\)"),
    "a head inside the decoder": (llama_4, r"text decoder \(Llama4ForCausalLM\) with a head of its own"),
    "dynamic NTK": (
        lambda: llava(rope_type="dynamic"),
        "'dynamic', whose frequencies change with the length",
    ),
    "longrope": (
        lambda: llava(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4),
        "'longrope', whose frequencies change with the length",
    ),
}


@pytest.mark.parametrize("build", REFUSED)
def test_refused_by_name_before_anything_is_traced(build, monkeypatch):
    monkeypatch.setattr("reroute_fx.capture.captured_decoder._export", None)
    model, message = REFUSED[build][0]().eval(), REFUSED[build][1]
    with pytest.raises(UnsupportedModelError, match=message):
        reroute_fx.compile(model, config=ROUTING, backend="eager")


def test_the_type_that_the_refusal_names_is_taken(monkeypatch):
    """Of those that it names, 'linear' is tried: it goes on to the trace."""

    def trace(*_):
        raise RuntimeError("traced")

    monkeypatch.setattr("reroute_fx.capture.captured_decoder._export", trace)
    with pytest.raises(RuntimeError, match="traced"):
        reroute_fx.compile(llava(rope_type="linear").eval(), config=ROUTING, backend="eager")
