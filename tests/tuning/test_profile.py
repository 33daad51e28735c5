"""Where a model looks, against attention and gradients that are computed plainly."""

import copy
import json
import math
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from test_families import ROUTED
from tiny_models import (
    IMAGE,
    LAYERS,
    TEXT,
    VISION,
    collate,
    llava_image,
    make_row,
    qwen_picture,
    tiny_llava,
    tiny_qwen,
)
from transformers import CLIPVisionConfig, Gemma2Config, LlavaConfig, LlavaForConditionalGeneration

import reroute_fx
from reroute_fx.capture import find_visual_token_ids
from reroute_fx.errors import BackendUnavailableError, ConfigError, InputError, UnsupportedModelError
from reroute_fx.tuning.profile import Profile
from reroute_fx.tuning.proposals import SHARES
from reroute_fx.tuning.watched_model import WatchedModel

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
"""In float64 too, attention that is spelt out rounds its softmax to float32."""
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def models():
    return {"llava": tiny_llava().double(), "qwen": tiny_qwen().double()}


def rows_of(family, count):
    """Prompts of one or two pictures and of different lengths."""
    random = torch.Generator().manual_seed(3)
    rows = []
    for number in range(count):
        pictures = [
            llava_image(random) if family == "llava" else qwen_picture(random, (1, 4, 6))
            for _ in range(1 + number % 2)
        ]
        rows.append(make_row(random, (2, *[1] * (len(pictures) - 1), 3 + number % 4), pictures))
    return rows


def inputs_of(model, rows):
    batch = collate(model, rows)
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def plain(model, row):
    """What a row shows, from the model's own attention maps and gradients, spelt out."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.set_attn_implementation("eager")
    inputs = inputs_of(model, [row])
    prompt = inputs["input_ids"].shape[1]
    for _ in range(NEW_TOKENS):  # greedily, without a cache
        logits = model(**inputs).logits[:, -1]
        logits[:, list(find_visual_token_ids(model.config))] = -torch.inf
        token = logits.argmax(dim=-1, keepdim=True)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in inputs:
                new = {"input_ids": token, "attention_mask": 1, "mm_token_type_ids": 0}[name]
                added = torch.zeros_like(token, dtype=inputs[name].dtype) + new
                inputs[name] = torch.cat([inputs[name], added], dim=1)
        if token.item() == model.generation_config.eos_token_id:
            break
    answer = inputs["input_ids"][0, prompt:]
    seen = {"embeds": [], "values": [], "heads": []}

    def enter(_, args, given):
        seen["embeds"].append(given["inputs_embeds"].requires_grad_())

    def add(_, given):
        given[0].retain_grad()
        seen["heads"].append(given[0])

    decoder = model.get_decoder()
    decoder.register_forward_pre_hook(enter, with_kwargs=True)
    for layer in decoder.layers:
        layer.self_attn.v_proj.register_forward_hook(
            lambda _, __, out: seen["values"].append(out[0].detach())
        )
        layer.self_attn.o_proj.register_forward_pre_hook(add)
    shorter = {
        name: value[:, :-1] if value.shape == inputs["input_ids"].shape else value
        for name, value in inputs.items()
    }
    output = model(**shorter, output_attentions=True)
    log_p = output.logits[0, prompt - 1 :].log_softmax(-1)[range(len(answer)), answer].sum()
    log_p.backward()
    visual = row.visual_positions
    behind = range(visual[-1] + 1, shorter["input_ids"].shape[1])
    found = {
        name: torch.zeros(LAYERS, HEADS, len(visual), dtype=torch.float64)
        for name in ("last", "text", "read")
    }
    effect = torch.zeros(LAYERS, HEADS, dtype=torch.float64)
    for layer in range(LAYERS):
        values = seen["values"][layer].unflatten(1, (KV_HEADS, HEAD_DIM))
        wanted = seen["heads"][layer].grad[0].unflatten(1, (HEADS, HEAD_DIM))
        for head in range(HEADS):
            attention = output.attentions[layer][0, head].detach()
            mine = values[:, head // (HEADS // KV_HEADS)]
            read = attention[prompt - 1] * mine.norm(dim=1)
            found["last"][layer, head] = attention[prompt - 1, visual]
            found["text"][layer, head] = attention[visual[-1] + 1 : prompt, visual].mean(dim=0)
            found["read"][layer, head] = read[visual] / read.sum()
            for token in visual:
                change = sum(attention[row, token] * mine[token] @ wanted[row, head] for row in behind)
                effect[layer, head] += abs(change)
    (embeds,) = seen["embeds"]
    saliency = embeds.grad[0, visual].norm(dim=1) * embeds[0, visual].detach().norm(dim=1)
    return found | {"effect": effect, "saliency": saliency}


@pytest.fixture(scope="module")
def references(models):
    return {family: [plain(model, row) for row in rows_of(family, 8)] for family, model in models.items()}


def test_what_is_seen_is_what_the_models_own_maps_and_gradients_say(models, references, family):
    """In batches with padding, with one and two pictures, with grouped queries."""
    watched, rows = WatchedModel(models[family]), rows_of(family, 8)
    for start in (0, 4):
        batch = inputs_of(models[family], rows[start : start + 4])
        for number, seen in enumerate(watched.observe(batch, NEW_TOKENS, True)):
            for name, expected in references[family][start + number].items():
                torch.testing.assert_close(getattr(seen, name), expected, **CLOSE)


def test_a_profile_is_the_mean_over_prompts(models, references, family):
    model, rows = models[family], rows_of(family, 8)
    batches = [inputs_of(model, rows[:3]), inputs_of(model, rows[3:])]
    found = reroute_fx.profile(model, batches, tier=0.25, max_new_tokens=NEW_TOKENS)
    expected = [statistics(reference, 0.25) for reference in references[family]]
    for name in ("attention", "text_attention", "entropy", "lost", "recall", "text_recall", "effect"):
        assert getattr(found, name).shape == (LAYERS, HEADS)
        np.testing.assert_allclose(
            getattr(found, name), np.mean([one[name] for one in expected], axis=0), **CLOSE
        )
    assert found.targets == tuple(tuple(one["targets"]) for one in expected)
    assert found.visual_tokens == tuple(len(row.visual_positions) for row in rows)
    assert found.attended[0][LAYERS - 1] == tuple(
        torch.argsort(-references[family][0]["last"][-1].mean(dim=0), stable=True)[
            : len(expected[0]["targets"])
        ].tolist()
    )


def statistics(reference, share):
    """The arrays of one prompt, head by head, and its targets."""
    tokens = reference["saliency"].numel()
    kept, count = max(1, int(tokens * share)), max(1, round(tokens / 24))
    targets = order(reference["saliency"])[:count]
    found = {"targets": targets, "effect": (reference["effect"] / reference["effect"].sum()).numpy()}
    names = ("attention", "text_attention", "entropy", "lost", "recall", "text_recall")
    found |= {name: np.zeros((LAYERS, HEADS)) for name in names}
    for layer in range(LAYERS):
        by_mean = order(reference["last"][layer].mean(dim=0))
        for head in range(HEADS):
            last, text = reference["last"][layer, head], reference["text"][layer, head]
            among = (last / last.sum()).tolist()
            found["attention"][layer, head], found["text_attention"][layer, head] = last.sum(), text.sum()
            found["entropy"][layer, head] = -sum(p * math.log(p) for p in among if p) / math.log(tokens)
            found["lost"][layer, head] = reference["read"][layer, head, by_mean[kept:]].sum()
            for name, scores in (("recall", last), ("text_recall", text)):
                found[name][layer, head] = len({*order(scores)[:kept]} & {*targets}) / count
    return found


def order(scores):
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))


@pytest.fixture
def prompts(models):
    return [inputs_of(models["llava"], rows_of("llava", 8))]


def test_curves_pass_through_the_recalls_and_end_at_one(models, prompts):
    share = SHARES[12]
    found = reroute_fx.profile(models["llava"], prompts, tier=share, max_new_tokens=2)
    for queries, name in (("last", "recall"), ("text", "text_recall")):
        curves = found.recall_curves[queries]
        assert curves.shape == (LAYERS, HEADS + 1, len(SHARES))
        np.testing.assert_array_equal(curves[:, :HEADS, 12], getattr(found, name))
        assert (np.diff(curves, axis=2) >= 0).all()
        assert (curves[..., -1] == 1).all()


def test_without_gradients_the_rest_is_the_same(models, prompts):
    with_them = reroute_fx.profile(models["llava"], prompts, max_new_tokens=2)
    without = reroute_fx.profile(models["llava"], prompts, max_new_tokens=2, gradient=False)
    for name in ("attention", "text_attention", "entropy", "lost"):
        np.testing.assert_allclose(getattr(without, name), getattr(with_them, name), rtol=1e-12)
    assert (without.recall, without.effect, without.targets, without.recall_curves) == (None,) * 4
    assert "recall" not in str(without)
    with pytest.raises(ConfigError, match="without gradients"):
        without.proposals()


@pytest.fixture(scope="module")
def taken(models):
    return reroute_fx.profile(
        models["llava"], [inputs_of(models["llava"], rows_of("llava", 8))], max_new_tokens=2
    )


def test_what_is_saved(tmp_path, taken):
    found = taken
    found.save(tmp_path / "profile.json")
    content = json.loads((tmp_path / "profile.json").read_text())
    np.testing.assert_array_equal(content["effect"], found.effect)
    np.testing.assert_array_equal(content["recall_curves"]["text"], found.recall_curves["text"])
    assert content["targets"] == [list(row) for row in found.targets]
    assert (content["model"], content["prompts_hash"]) == (
        "LlavaForConditionalGeneration",
        found.prompts_hash,
    )


@pytest.mark.parametrize("gradient", [True, False])
def test_what_is_loaded_is_what_was_saved(tmp_path, models, taken, prompts, gradient):
    found = taken
    if not gradient:
        found = reroute_fx.profile(models["llava"], prompts, max_new_tokens=2, gradient=False)
    found.save(tmp_path / "profile.json")
    loaded = Profile.load(tmp_path / "profile.json")
    assert loaded.to_dict() == found.to_dict()
    assert str(loaded) == str(found)
    assert all(
        type(getattr(loaded, field.name)) is type(getattr(found, field.name)) for field in fields(Profile)
    )
    if gradient:
        assert loaded.proposals(num=3) == found.proposals(num=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"effect": None}, "some are null; expected all or none"),
        ({"attention": [[0.5, 0.5], [0.5]]}, r"attention has rows of \[2, 1\] numbers; expected 2 rows of 2"),
        ({"recall_curves": {"last": []}}, r"recall_curves is of \['last'\]; expected \['last', 'text'\]"),
        ({"recall_curves": {"last": [], "text": []}}, r"has 0 layers; expected 8"),
        ({"shares": [0.5]}, r"shares is \(0\.5,\)"),
        ({"targets": [[1]]}, "targets is of 1 prompts; expected 8"),
        ({"entropy": [["high"]]}, r"entropy\[0\]\[0\] is 'high'"),
        ({"labels": []}, "labels is .*no such field"),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path, taken, change, message):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(taken.to_dict() | change))
    with pytest.raises(ConfigError, match=message):
        Profile.load(path)


def state(model):
    parts = [(name, part.training, len(part._forward_pre_hooks)) for name, part in model.named_modules()]
    weights = [(p.requires_grad, p.grad is None, p.data_ptr()) for p in model.parameters()]
    kept = model.config.to_json_string(), model.generation_config.to_json_string()
    return parts, weights, kept, model.get_decoder().config._attn_implementation


@pytest.fixture
def trained(models):
    """A model in training, with other attention and some frozen parameters."""
    model = copy.deepcopy(models["llava"]).train()
    model.set_attn_implementation("eager")
    model.get_input_embeddings().requires_grad_(False)
    return model


class NoSlope(torch.autograd.Function):
    @staticmethod
    def forward(context, hidden):
        return hidden.clone()

    @staticmethod
    def backward(context, slope):
        raise NotImplementedError("int4 products have no derivative")


class Packed(torch.nn.Module):
    def forward(self, hidden):
        return NoSlope.apply(hidden)


def test_the_model_stays_as_it_is(trained, models, prompts):
    before = state(trained)
    found = reroute_fx.profile(trained, prompts, max_new_tokens=2)
    assert state(trained) == before
    expected = reroute_fx.profile(models["llava"], prompts, max_new_tokens=2)
    np.testing.assert_allclose(found.effect, expected.effect, **CLOSE)


def test_a_model_without_gradients_is_refused_and_stays_as_it_is(trained, prompts):
    trained.get_decoder().layers[3].mlp = Packed()
    before = state(trained)
    with pytest.raises(UnsupportedModelError, match=r"int4 products have no derivative.*gradient=False"):
        reroute_fx.profile(trained, prompts, max_new_tokens=2)
    assert state(trained) == before
    assert reroute_fx.profile(trained, prompts, max_new_tokens=2, gradient=False).effect is None


@pytest.mark.parametrize("name", ["InternVL", "LLaVA-OneVision", "Qwen2-VL", "GLM-4.5V"])
def test_other_families(name):
    torch.manual_seed(0)
    model, inputs = ROUTED[name]()
    found = reroute_fx.profile(model.eval().bfloat16(), [in_bfloat16(inputs)] * 8, max_new_tokens=2)
    assert found.effect.shape == (6, HEADS)
    assert found.effect.sum() == pytest.approx(1)
    assert found.visual_tokens == (int((inputs["input_ids"] == IMAGE).sum()),) * 8


def test_an_answer_holds_no_placeholders(models):
    """A model that would say one is asked what it says besides."""
    model, rows = copy.deepcopy(models["llava"]), rows_of("llava", 1)
    with torch.no_grad():
        model.lm_head.weight[IMAGE] = model.lm_head.weight.abs().max() * 100
        assert model(**inputs_of(model, rows)).logits[0, -1].abs().argmax() == IMAGE
        model.lm_head.weight[IMAGE] *= model(**inputs_of(model, rows)).logits[0, -1, IMAGE].sign()
        assert model(**inputs_of(model, rows)).logits[0, -1].argmax() == IMAGE
    (seen,) = WatchedModel(model).observe(inputs_of(model, rows), 1, True)
    assert seen.effect.isfinite().all()
    answer, _ = WatchedModel(model)._answer(inputs_of(model, rows), 6)
    assert IMAGE not in answer


def in_bfloat16(inputs):
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}


class Mixer(torch.nn.Module):
    def forward(self, hidden_states, **_):
        return hidden_states, None


def test_attention_that_cannot_be_watched_is_refused(models, prompts):
    model = copy.deepcopy(models["llava"])
    model.get_decoder().layers[5].self_attn = Mixer()
    with pytest.raises(UnsupportedModelError, match="8 layers, but 7 of its attention blocks"):
        reroute_fx.profile(model, prompts)


def test_other_kinds_of_attention_are_refused():
    text = Gemma2Config(**{**TEXT, "num_hidden_layers": 2, "head_dim": 8})
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=50)
    model = LlavaForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match="attends with softcap"):
        reroute_fx.profile(model, [collate(model, rows_of("llava", 8))])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": 100}, "tier is 100"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": True}, "batch_size is True"),
    ],
)
def test_other_options_are_refused(models, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        reroute_fx.profile(models["llava"], prompts, **options)


def test_other_models_are_refused(models, prompts):
    with pytest.raises(UnsupportedModelError, match="is a Linear"):
        reroute_fx.profile(torch.nn.Linear(2, 2), prompts)
    with torch.device("meta"):
        empty = LlavaForConditionalGeneration(models["llava"].config)
    with pytest.raises(UnsupportedModelError, match="on the meta device"):
        reroute_fx.profile(empty, prompts)


def test_too_few_prompts_and_positions_are_refused(models, prompts):
    with pytest.raises(InputError, match="expected at least 8"):
        reroute_fx.profile(models["llava"], [inputs_of(models["llava"], rows_of("llava", 7))])
    ids = prompts[0]["input_ids"]
    placed = prompts[0] | {"position_ids": torch.arange(ids.shape[1]).expand(ids.shape)}
    with pytest.raises(InputError, match="position_ids; expected none"):
        reroute_fx.profile(models["llava"], [placed])


def test_a_picture(tmp_path, models, prompts, monkeypatch):
    found = reroute_fx.profile(models["llava"], prompts, max_new_tokens=1)
    found.plot(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match=r"ends in one of"):
        found.plot(tmp_path / "profile.gifv")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BackendUnavailableError, match="matplotlib"):
        found.plot(tmp_path / "profile.png")
