"""The head of a decoder gives the logits that the model around it gives."""

import pytest
import torch
from tiny_models import IMAGE, TEXT, VISION, sharp
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from reroute_fx.capture.vocabulary import capture_head

BOUND = 1.5
"""Logits lie near 4."""

pytestmark = pytest.mark.usefixtures("no_gradients")


def gemma2(**options):
    return Gemma2Config(**TEXT, num_hidden_layers=2, head_dim=8, **options)


def paligemma(**options):
    config = PaliGemmaConfig(
        text_config=gemma2(**options),
        vision_config=SiglipVisionConfig(**VISION, vocab_size=64),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return sharp(PaliGemmaForConditionalGeneration, config), {"token_type_ids": torch.zeros(1, 5).long()}


def llava(**options):
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=gemma2(**options), image_token_index=IMAGE
    )
    return sharp(LlavaForConditionalGeneration, config), {}


@pytest.mark.parametrize(
    ("build", "bound", "is_bounded"),
    [(paligemma, BOUND, True), (paligemma, None, False), (llava, BOUND, False)],
    ids=["a model that bounds", "no bound", "a model that leaves it to the decoder"],
)
def test_logits_are_bounded_where_the_model_bounds_them(build, bound, is_bounded):
    model, types = build(final_logit_softcapping=bound)
    output = model(input_ids=torch.tensor([[1, 5, 17, 23, 29]]), **types, output_hidden_states=True)
    program = capture_head(model, takes_types=bool(types)).module()
    found = program(given=output.hidden_states[-1])["logits"]
    torch.testing.assert_close(found, output.logits, atol=1e-5, rtol=0)
    assert (found.abs().max() < BOUND) == is_bounded
    assert program(given=torch.zeros(3, 7, TEXT["hidden_size"]))["logits"].shape == (3, 7, TEXT["vocab_size"])
