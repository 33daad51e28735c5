"""Decoders that no pass was written for: routed exactly, or refused with the reason."""

import json
from pathlib import Path

import pytest
import torch
from suite_tiers import share
from tiny_models import IMAGE, TEXT, VISION
from transformers import (
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    GPTNeoXConfig,
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    GraniteConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MixtralConfig,
    PhiConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

import reroute_fx
from reroute_fx import InputError, RoutingConfig, UnsupportedModelError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECORD = BENCHMARKS / "results" / "families.json"
GROUPED = {**TEXT, "num_hidden_layers": 6}
SIZES = {name: size for name, size in GROUPED.items() if name != "num_key_value_heads"}
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


def prompt(count):
    return torch.tensor([[1, 7, *[IMAGE] * count, 9, 11, 13]])


def llava(text):
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config), {
        "input_ids": prompt(16),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }


def internvl():
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    text = {**GROUPED, "model_type": "qwen2"}
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=4)
    return InternVLForConditionalGeneration(config), {
        "input_ids": prompt(4),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }


def onevision():
    config = LlavaOnevisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        text_config={**GROUPED, "model_type": "qwen2"},
        image_token_index=IMAGE,
        video_token_index=49,
        image_grid_pinpoints=[[16, 16]],
    )
    return LlavaOnevisionForConditionalGeneration(config), {
        "input_ids": prompt(36),
        "pixel_values": torch.randn(1, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]]),
    }


def qwen(model_class, config_class, vision, patch, **text):
    config = config_class(
        text_config={**GROUPED, "head_dim": 8, "rope_parameters": MULTIMODAL_ROPE, **text},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=49,
        vision_start_token_id=48,
        vision_end_token_id=47,
    )
    ids = torch.tensor([[1, 48, *[IMAGE] * 16, 47, 11, 13]])
    return model_class(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(64, 3 * 2 * patch * patch),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return qwen(Qwen2VLForConditionalGeneration, Qwen2VLConfig, vision, patch=14)


DEEPSTACK = {
    "depth": 4,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 32,
    "deepstack_visual_indexes": [0, 1, 2],
    "num_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def qwen3_vl_moe():
    """Visual features are added behind the first three layers of the decoder."""
    return qwen(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig, DEEPSTACK, patch=16, **EXPERTS)


def qwen3_omni():
    ids = torch.tensor([[1, 48, *[IMAGE] * 16, 47, 11, 13]])
    config = Qwen3OmniMoeThinkerConfig(
        text_config={**GROUPED, "head_dim": 8, "rope_parameters": MULTIMODAL_ROPE, **EXPERTS},
        vision_config={**DEEPSTACK, "image_size": 64},
        audio_config={
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 16,
            "output_dim": 32,
            "downsample_hidden_size": 8,
        },
        image_token_id=IMAGE,
        video_token_id=49,
        audio_token_id=46,
        vision_start_token_id=48,
        vision_end_token_id=47,
        audio_start_token_id=45,
        audio_end_token_id=44,
    )
    return Qwen3OmniMoeThinkerForConditionalGeneration(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(64, 3 * 2 * 16 * 16),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
    }


def granite_4_vision():
    """All visual features are added in front of layers of the decoder, into placeholders of zeros."""
    vision = {**VISION, "model_type": "siglip_vision_model", "hidden_size": 64, "num_hidden_layers": 4}
    config = Granite4VisionConfig(
        vision_config=vision,
        text_config={**GROUPED, "model_type": "granite4_vision_text"},
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        deepstack_layer_map=[[1, 0], [2, 2]],
        spatial_target_layers=[1, 3, 4, 5],
        image_grid_pinpoints=[[16, 16]],
        downsample_rate="2/4",
    )
    return Granite4VisionForConditionalGeneration(config), {
        "input_ids": prompt(10),
        "pixel_values": torch.randn(1, 2, 3, 16, 16),
        "image_sizes": torch.tensor([[16, 16]]),
        "vision_feature_select_strategy": "full",
    }


def glm_moe():
    """Its config gives the decoder ``output_router_logits=False``."""
    config = Glm4vMoeConfig(
        text_config={
            **GROUPED,
            "head_dim": 8,
            "rope_parameters": {**MULTIMODAL_ROPE, "partial_rotary_factor": 1.0},
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "image_size": 32,
        },
        image_token_id=IMAGE,
        video_token_id=49,
        image_start_token_id=48,
        image_end_token_id=47,
        video_start_token_id=46,
        video_end_token_id=45,
    )
    ids = torch.tensor([[1, 48, *[IMAGE] * 16, 47, 11, 13]])
    return Glm4vMoeForConditionalGeneration(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(64, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def gemma3():
    text = {**GROUPED, "head_dim": 8, "sliding_window": 512}
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION,
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
        boi_token_index=48,
        eoi_token_index=47,
    )
    ids = torch.tensor([[1, 48, *[IMAGE] * 4, 47, 11, 13]])
    return Gemma3ForConditionalGeneration(config), {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 16, 16),
        "token_type_ids": (ids == IMAGE).long(),
    }


ROUTED = {
    "soft-capped logits and windows": lambda: llava(Gemma2Config(**GROUPED, head_dim=8, sliding_window=8)),
    "query and key norms": lambda: llava(Qwen3Config(**GROUPED, head_dim=8)),
    "scaled embeddings": lambda: llava(GemmaConfig(**GROUPED, head_dim=8)),
    "scaled residuals": lambda: llava(
        GraniteConfig(**GROUPED, residual_multiplier=0.5, attention_multiplier=0.2, embedding_multiplier=2.0)
    ),
    "parallel blocks, Phi": lambda: llava(PhiConfig(**SIZES)),
    "parallel blocks, Cohere": lambda: llava(CohereConfig(**GROUPED)),
    "fused projections": lambda: llava(GPTNeoXConfig(**SIZES)),
    "experts": lambda: llava(MixtralConfig(**GROUPED, num_local_experts=4, sliding_window=None)),
    "experts, grouped and normed": lambda: llava(
        Qwen3MoeConfig(**GROUPED, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    ),
    "rotary positions of Llama 3.1": lambda: llava(LlamaConfig(**GROUPED, rope_parameters=LLAMA_3_ROPE)),
    "rotary positions of yarn": lambda: llava(
        LlamaConfig(**GROUPED, max_position_embeddings=256, rope_parameters=YARN)
    ),
    "InternVL": internvl,
    "LLaVA-OneVision": onevision,
    "Qwen2-VL": qwen2_vl,
    "GLM-4.5V": glm_moe,
    "Qwen3-VL-MoE": qwen3_vl_moe,
    "Qwen3-Omni": qwen3_omni,
    "Granite 4 Vision": granite_4_vision,
    "Gemma 3": gemma3,
}

REFUSED = {
    "rotary positions that change": (
        lambda: llava(LlamaConfig(**GROUPED, rope_parameters={**YARN, "rope_type": "dynamic"})),
        UnsupportedModelError,
        "'dynamic', whose frequencies change",
    ),
}


IN_THE_GATE = ("experts",)


@pytest.mark.parametrize("family", share(ROUTED, IN_THE_GATE, "three routings of a captured model take 6 s"))
def test_routed_exactly(family):
    torch.manual_seed(0)
    model, inputs = ROUTED[family]()
    model.eval()
    everything = RoutingConfig((2, 4), (1.0, 1.0))
    outputs = [
        reroute_fx.compile(model, config=config, backend="eager")
        for config in (
            everything,
            RoutingConfig((2, 4), (0.5, 0.25), "compact_route"),
            RoutingConfig((2, 4), (0.5, 0.25), "compact_route_stagewise"),
        )
    ]
    with torch.no_grad():
        unrouted = model(**inputs)
        full, per_layer, stagewise = (routed(**inputs) for routed in outputs)
    torch.testing.assert_close(full.logits, unrouted.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(per_layer.logits, stagewise.logits)
    text = int((inputs["input_ids"] != IMAGE).sum())
    visual = inputs["input_ids"].shape[1] - text
    kept = stagewise.routing.config.tokens_per_layer(6, visual)
    assert list(stagewise.routing.kv_lengths[0]) == [text + k for k in kept]
    new = outputs[2].generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert new.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize("family", REFUSED)
def test_refused_with_the_reason(family):
    build, error, message = REFUSED[family]
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()

    def route():
        routed = reroute_fx.compile(model, config=RoutingConfig((2, 4), (0.5, 0.25)), backend="eager")
        with torch.no_grad():
            routed(**inputs)

    with pytest.raises(error, match=message):
        route()


@pytest.mark.full("10 s for one model")
def test_router_logits_that_are_asked_for_are_refused_by_name():
    torch.manual_seed(0)
    model, inputs = glm_moe()
    routed = reroute_fx.compile(model.eval(), config=RoutingConfig((2, 4), (0.5, 0.25)), backend="eager")
    with torch.no_grad():
        assert routed(**inputs, output_router_logits=False).router_logits is None
        with pytest.raises(
            InputError, match="output_router_logits is True, in the call or in the model's config"
        ):
            routed(**inputs, output_router_logits=True)


@pytest.mark.full("11 s; two families are captured to read what their reports say")
def test_report_names_what_the_flops_leave_out():
    model, _ = ROUTED["experts"]()
    report = reroute_fx.inspect(model.eval(), tier=0.6)
    assert report.uncounted
    assert f"Not counted: {report.uncounted[0]}" in str(report)
    dense, _ = ROUTED["query and key norms"]()
    assert reroute_fx.inspect(dense.eval(), tier=0.6).uncounted == ()


@pytest.fixture
def families(benchmark_module):
    return benchmark_module("families")


@pytest.mark.full("5 s to 20 s each to capture a model of its own")
@pytest.mark.parametrize(
    "name", ["Kimi K2.5", "Video-LLaVA", "GLM-4.1V", "MiniMax M3 without blocks", "Video-LLaMA 3", "Ovis2"]
)
def test_a_family_answers_as_recorded(families, families_table, name):
    with torch.no_grad():
        found = families.ask(families.FAMILIES[name], {}, [])
    recorded = json.loads(RECORD.read_text())["families"][name]
    columns = [column for column in families_table.COLUMNS if column in found]
    assert {column: families_table.is_exact(found[column]) for column in columns} == {
        column: families_table.is_exact(recorded[column]) for column in columns
    }
    assert families_table.is_exact(found["identity"])


@pytest.mark.full("6 s for one model")
def test_rows_of_text_beside_pictures_are_answered(families):
    """SmolVLM encodes the pictures of all rows at once; a row without any has one of no tokens."""
    family = families.FAMILIES["SmolVLM"]
    model = family.build()
    given = families.prompts(model, family)
    given["input_ids"][1] = torch.tensor([0] * 6 + [1, 5, 6, 7, 8])
    given["attention_mask"] = (given["input_ids"] != 0).long()
    given["pixel_values"][1] = 0
    with torch.no_grad():
        routed = reroute_fx.compile(model, config=families.EVERYTHING, backend="eager")
        assert torch.equal(families.greedy(routed, given), families.greedy(model, given))


@pytest.fixture
def families_table(benchmark_module):
    return benchmark_module("families_table")


def test_the_record_has_the_breadth_that_the_documentation_claims(families_table):
    """By `benchmarks/families.py`; what changed there, a family that is refused now, is seen in its diff."""
    record = json.loads(RECORD.read_text())["families"]
    exact = [
        name
        for name, found in record.items()
        if all(families_table.is_exact(found.get(column)) for column in ("compiles", "identity", "batch"))
    ]
    assert len(exact) >= 60
    artifacts = [name for name, found in record.items() if families_table.is_exact(found.get("onnx"))]
    assert len(artifacts) >= 50
    crashes = ("AttributeError", "IndexError", "KeyError", "RuntimeError", "TypeError", "ValueError")
    answers = [(name, found[column]) for name, found in record.items() for column in found]
    assert not [each for each in answers if str(each[1]).startswith(crashes)]


def test_the_table_of_the_documentation_is_made_from_the_record(families_table):
    record, page = json.loads(RECORD.read_text())["families"], families_table.PAGE.read_text()
    assert families_table.page_with(record, page) == page
    assert page.index("## Features inside the decoder") > page.index(families_table.END)
    with pytest.raises(ValueError, match="lacks one of the marks"):
        families_table.page_with(record, page.replace(families_table.END, ""))
    assert families_table.page_with(record | {"more": next(iter(record.values()))}, page) != page


def test_reasons_are_quoted_once_below_the_table(families_table):
    of_all = {"class": "A", "date": "2026-01-02", "versions": {"torch": "2"}}
    text = families_table.table(
        {
            "one": {**of_all, "compiles": "MatchError: why"},
            "two": {**of_all, "compiles": "MatchError: why"},
            "three": {**of_all, "compiles": True, "identity": 1e-6, "batch": 0.5, "video": None},
        }
    )
    assert "| one | `A` | no [1] |" in text
    assert "| two | `A` | no [1] |" in text
    assert "| three | `A` | yes | yes | no [2] |  | - |" in text
    assert "1. `MatchError: why`\n2. `differs by 5.0e-01 of the largest logit`" in text
    assert "Of 3 families 1 compile" in text
