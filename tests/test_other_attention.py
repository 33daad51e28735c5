"""Decoders that attend in another way than the captured program, and models that hand theirs another mask."""

import copy

import pytest
import torch
from suite_tiers import one, share
from tiny_models import IMAGE, TEXT, VISION, llava_config, sharp
from transformers import CLIPVisionConfig, GemmaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.llava.modeling_llava import LlavaModel

import reroute_fx
from reroute_fx import RoutingConfig, UnsupportedModelError
from reroute_fx.passes import Reach
from reroute_fx.runtime import RoutedCache
from reroute_fx.runtime.masks import _read_prompt, read_masks
from reroute_fx.runtime.prompt import TokensOnCache

EVERYTHING = RoutingConfig((1,), (1.0,))
ROUTING = RoutingConfig((1,), (0.5,))
SIZES = {**TEXT, "num_hidden_layers": 2, "head_dim": 8}

pytestmark = pytest.mark.usefixtures("no_gradients")


def over_gemma():
    """A model that makes no masks, around a decoder whose tokens all see each other."""
    text = GemmaConfig(**SIZES, use_bidirectional_attention=True)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE)
    return sharp(LlavaForConditionalGeneration, config)


def test_what_the_captured_attention_does_not_know_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"attends in another way.*whose tokens see later ones"):
        reroute_fx.compile(over_gemma(), config=EVERYTHING, backend="eager")


@one("each captures a model")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "dtype",
    share(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64],
        [torch.float32, torch.bfloat16],
        "each captures a model",
    ),
)
def test_another_implementation_of_the_same_is_no_difference(implementation, dtype):
    model = sharp(LlavaForConditionalGeneration, llava_config(3)).to(dtype)
    model.set_attn_implementation(implementation)
    reroute_fx.compile(model, config=EVERYTHING, backend="eager")


class MaskedModel(LlavaModel):
    """Hands its decoder a mask that `mask` makes of the number of rows and columns."""

    mask = None

    def forward(self, input_ids, pixel_values=None, attention_mask=None, past_key_values=None, **given):
        columns = input_ids.shape[1] + (past_key_values.get_seq_length() if past_key_values else 0)
        own = type(self).mask(input_ids.shape[0], columns, attention_mask)[..., -input_ids.shape[1] :, :]
        given |= {"attention_mask": {"full_attention": own}, "past_key_values": past_key_values}
        return super().forward(input_ids, pixel_values, **given)


def causal(rows, columns, padding):
    seen = torch.ones(columns, columns, dtype=torch.bool).tril().expand(rows, 1, -1, -1)
    return seen if padding is None else seen & padding.bool()[:, None, None]


def additive(rows, columns, padding):
    forbidden = torch.finfo(torch.float32).min
    return torch.zeros(rows, 1, columns, columns).masked_fill(~causal(rows, columns, padding), forbidden)


def with_blocks(rows, columns, padding):
    seen = causal(rows, columns, padding).clone()
    seen[:, :, 2:18, 2:18] = True
    return seen


def far(columns):
    """What lies three tokens back and more."""
    return torch.ones(columns, columns, dtype=torch.bool).tril(-3)


def with_a_window(rows, columns, padding):
    return causal(rows, columns, padding) & ~causal(rows, columns, None).roll(7, dims=2).tril(-7)


@pytest.fixture(scope="module")
def masked():
    model = sharp(LlavaForConditionalGeneration, llava_config(2))
    other = copy.deepcopy(model)
    other.model.__class__ = MaskedModel
    return tuple(reroute_fx.compile(m, config=ROUTING, backend="eager") for m in (model, other))


def prompts(padded):
    ids = torch.tensor([[1, 7, *[IMAGE] * 16, 9, 11, 13], [3, *[IMAGE] * 16, 5, 6, 0, 0]])
    given = {"input_ids": ids, "pixel_values": torch.linspace(-1, 1, 2 * 768).reshape(2, 3, 16, 16)}
    if padded:
        given["attention_mask"] = (ids != 0).long()
    return given


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("mask", [causal, additive])
def test_the_causal_mask_in_other_words_is_taken(masked, monkeypatch, mask, padded):
    plain, routed = masked
    monkeypatch.setattr(MaskedModel, "mask", mask)
    given = prompts(padded)
    assert torch.equal(routed(**given).logits, plain(**given).logits)
    answers = [m.generate(**given, max_new_tokens=3, do_sample=False) for m in masked]
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    ("mask", "what"), [(with_blocks, "token 2 sees token 3"), (with_a_window, "token 7 does not see token 0")]
)
def test_another_mask_is_refused_with_the_first_difference(masked, monkeypatch, mask, what):
    monkeypatch.setattr(MaskedModel, "mask", mask)
    with pytest.raises(
        UnsupportedModelError, match=rf"attention mask in which {what}; expected the causal one"
    ):
        masked[1](**prompts(padded=False))


def test_masks_of_other_forms_are_refused(masked, monkeypatch):
    monkeypatch.setattr(MaskedModel, "mask", lambda *_: torch.ones(1, 30, 30))
    with pytest.raises(UnsupportedModelError, match="attention mask in a form of its own"):
        masked[1](**prompts(padded=False))


@pytest.mark.parametrize("kinds", [("full", "sliding"), ("sliding", "full")])
def test_of_several_masks_each_is_looked_at(kinds):
    """Of four new tokens behind two."""
    masks = dict.fromkeys(kinds)
    reaches, call = {"full": [Reach()], "sliding": [Reach(3)]}, TokensOnCache(RoutedCache(), None)
    assert read_masks(masks, call, 4, reaches) is None
    right = {"full": causal(1, 6, None)[:, :, 2:], "sliding": (causal(1, 6, None) & ~far(6))[:, :, 2:]}
    assert read_masks(right, call, 4, reaches) is None
    for kind in kinds:
        wrong = right[kind].clone()
        wrong[..., 3, 4] = False
        with pytest.raises(UnsupportedModelError, match="in which token 3 does not see token 4"):
            read_masks({**masks, kind: wrong}, call, 4, reaches)
    with pytest.raises(UnsupportedModelError, match="in which token 1 sees token 0"):
        read_masks({"sliding": right["full"]}, call, 4, reaches)
    # No layer reads what has another name.
    assert read_masks({**right, "chunked": wrong}, call, 4, reaches) is None


@pytest.mark.parametrize("place", [0, 1])
def test_of_several_masks_of_a_prompt_each_is_looked_at(place):
    masks = [(causal(1, 6, None), [Reach()]), (causal(1, 6, None) & ~far(6), [Reach(3)])]
    assert _read_prompt(masks, None) is None
    mask, reaches = masks[place]
    wrong = mask.clone()
    wrong[..., 5, 4] = False
    masks[place] = wrong, reaches
    with pytest.raises(UnsupportedModelError, match="in which token 5 does not see token 4"):
        _read_prompt(masks, None)
