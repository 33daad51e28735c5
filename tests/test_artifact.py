"""Artifacts answer as the models that they were exported from."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifacts import TIERS, artifact, exact_at, expect_equal, routed_at
from conversations import (
    BATCHES,
    IMAGE,
    MIXED,
    SINGLE,
    TEXT,
    VIDEO,
    batch,
    forward_and_steps,
    new_tokens,
    unrouted_model,
)
from safetensors import safe_open
from safetensors.torch import save_file
from suite_tiers import fewer, share
from transformers import DynamicCache, TextStreamer

import reroute_fx
from reroute_fx import InputError, RoutedCache
from reroute_fx.artifact import ArtifactReport
from reroute_fx.runtime.loaded_model import PROGRAMS

TIER = TIERS[0]
CONVERSATIONS = {**BATCHES, "text": TEXT, "right": MIXED}
QWEN = pytest.mark.full("compiling Qwen takes 150 s; the gate has LLaVA, and Qwen in ONNX (test_onnx.py)")


@pytest.fixture(params=["llava", pytest.param("qwen", marks=QWEN)])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The artifact of each family, and the model that it was exported from."""
    models = {}

    def load(family):
        if family not in models:
            models[family] = reroute_fx.load(artifact(tmp_path_factory, family)), routed_at(family, TIER)
        return models[family]

    return load


def ask(family, name):
    return batch(family, *CONVERSATIONS[name], pad="right" if name == "right" else "left")


@fewer(gate=1, full=3, reason="tiers: 10 s each; their programs differ in numbers")
@pytest.mark.parametrize("rows", share(BATCHES, ["single"], "20 s each"))
def test_in_a_fresh_process(family, rows, rounds, tmp_path_factory, tmp_path):
    """No modeling code, nothing unpickled, nothing traced, and the same answers at each tier."""
    tiers = TIERS[:rounds]
    inputs = batch(family, *BATCHES[rows])
    save_file(inputs, tmp_path / "inputs.safetensors")
    folders = [str(artifact(tmp_path_factory, family, tier)) for tier in tiers]
    script = Path(__file__).parent / "fresh_process.py"
    command = [sys.executable, str(script), str(tmp_path / "inputs.safetensors"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["modeling"] == []
    assert found["unpickled"] == []
    for tier, result in zip(tiers, found["results"], strict=True):
        routed = routed_at(family, tier)
        with torch.no_grad():
            expected, exact = routed(**inputs), exact_at(family, tier)(**inputs)
        assert result["tokens"] == routed.generate(**inputs, max_new_tokens=12, do_sample=False).tolist()
        kept = {str(k): [row.tolist() for row in v] for k, v in expected.routing.selected.items()}
        assert result["kept"] == kept
        expect_equal(torch.tensor(result["logits"]), expected.logits[:, -1], exact.logits[:, -1])


@pytest.mark.parametrize("rows", CONVERSATIONS)
@torch.no_grad()
def test_prompts_and_steps(loaded, family, rows):
    model, routed = loaded(family)
    inputs = ask(family, rows)
    found, expected = model(**inputs), routed(**inputs)
    is_token = inputs["attention_mask"].bool()
    logits = [
        forward_and_steps(each, inputs, [9, 10, 11]) for each in (model, routed, exact_at(family, TIER))
    ]
    expect_equal(*(each[:, :-3][is_token] for each in logits))
    expect_equal(*(each[:, -3:] for each in logits))
    if rows != "text":
        for layer in routed.routing_config.decision_layers:
            for ours, theirs in zip(
                found.routing.selected[layer], expected.routing.selected[layer], strict=True
            ):
                assert torch.equal(ours, theirs)
        assert found.routing.kv_lengths == expected.routing.kv_lengths


@pytest.mark.parametrize("rows", CONVERSATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20, "temperature": 0.7},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "sampled", "beams", "several", "no-cache"],
)
def test_generation(loaded, family, rows, options):
    model, routed = loaded(family)
    inputs = same = ask(family, rows)
    if rows == "right" and options.get("use_cache") is False:
        # Without a cache transformers goes on at the position of the column, padding counted; here it never counts.
        same = ask(family, "padded")
    answers = []
    for each, given in ((model, inputs), (routed, same)):
        torch.manual_seed(7)
        answers.append(new_tokens(each, given, max_new_tokens=10, **options))
    assert torch.equal(*answers)


def test_generation_ends_where_it_should(loaded, family):
    model, _ = loaded(family)
    inputs = batch(family, *SINGLE)
    free = new_tokens(model, inputs, max_new_tokens=10, do_sample=False)[0].tolist()
    ended = new_tokens(model, inputs, max_new_tokens=10, do_sample=False, eos_token_id=free[3])[0].tolist()
    assert ended == free[: free.index(free[3]) + 1]


def test_words_stream(loaded, capsys):
    model, _ = loaded("llava")
    inputs = batch("llava", *SINGLE)
    streamer = TextStreamer(model.processor.tokenizer, skip_prompt=True)
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=streamer)
    words = capsys.readouterr().out.split()
    assert words == model.processor.tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :]).split()


@QWEN
@torch.no_grad()
def test_videos(loaded):
    """Two frames with 2.5 seconds between them, next to an image: positions in time, height and width."""
    row = [1, 5, *[VIDEO] * 32, 9, *[IMAGE] * 16, 11, 12]
    inputs = batch("qwen", row)
    draw = torch.Generator().manual_seed(3)
    inputs |= {
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).int() + 2 * (inputs["input_ids"] == VIDEO).int(),
        "pixel_values_videos": torch.randn(128, 96, generator=draw),
        "video_grid_thw": torch.tensor([[2, 8, 8]]),
        "second_per_grid_ts": torch.tensor([2.5]),
    }
    model, routed = loaded("qwen")
    expect_equal(*(each(**inputs).logits for each in (model, routed, exact_at("qwen", TIER))))
    answers = [new_tokens(each, inputs, max_new_tokens=8, do_sample=False) for each in loaded("qwen")]
    assert torch.equal(*answers)


@torch.no_grad()
def test_conversations_take_turns(loaded, family):
    answers = []
    for model in (*loaded(family), exact_at(family, TIER)):
        output = model(**batch(family, *SINGLE))
        turn = torch.tensor([[9, 8, 7]])
        output = model(input_ids=turn, past_key_values=output.past_key_values)
        answers.append(output.logits)
    expect_equal(*answers)


@torch.no_grad()
def test_empty_caches_are_filled(loaded, family):
    model, _ = loaded(family)
    inputs, cache = batch(family, *SINGLE), DynamicCache()
    output = model(**inputs, past_key_values=cache)
    assert output.past_key_values is cache
    assert isinstance(cache, RoutedCache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert model(**inputs, use_cache=False).past_key_values is None
    assert torch.equal(model(**inputs, return_dict=False)[0], output.logits)
    last = model(**inputs, logits_to_keep=2).logits
    assert (last - output.logits[:, -2:]).abs().max() < 1e-5


def test_weights_are_there_once(loaded, family, tmp_path_factory):
    """On disk and in memory: what the programs share is one tensor."""
    model, _ = loaded(family)
    with safe_open(artifact(tmp_path_factory, family) / "weights.safetensors", framework="pt") as file:
        names = set(file.keys())
    held = {
        name: tensor.data_ptr()
        for program in model._parts.programs.values()
        for name, tensor in zip(program.schedule.weights, program.weights, strict=True)
    }
    assert held.keys() == names
    assert len(set(held.values())) == len(held)
    plain = {p.data_ptr() for p in unrouted_model(family).parameters()}
    assert len(held) <= len(plain) + 10  # and what is computed once, such as frequencies


def test_weights_have_their_names(tmp_path_factory, family):
    model = unrouted_model(family)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with safe_open(artifact(tmp_path_factory, family) / "weights.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if not name.startswith("constants."):
                assert torch.equal(file.get_tensor(name), state[name])


def test_packages_hold_no_weights(tmp_path_factory, family):
    """Each layer has thousands of them, 4 bytes each; their values are spread and don't compress."""
    weights = [p for p in unrouted_model(family).parameters() if p.ndim > 1]
    packages = list(artifact(tmp_path_factory, family).glob("programs/*.pt2"))
    assert packages
    for path in packages:
        held = path.read_bytes()
        for weight in weights:
            assert weight.detach().flatten()[:8].numpy().tobytes() not in held


@pytest.mark.full("another artifact; test_structure.py compiles another tier without compiling anew")
def test_tiers_share_their_code(tmp_path_factory, family):
    """Keep counts are inputs: only the manifest and the configs differ from tier to tier."""
    first, second = (artifact(tmp_path_factory, family, tier) for tier in TIERS[:2])
    names = {path.name for path in first.glob("programs/*.pt2")}
    assert names == {path.name for path in second.glob("programs/*.pt2")}
    assert all((first / "programs" / n).read_bytes() == (second / "programs" / n).read_bytes() for n in names)


def test_the_report_tells_what_is_there(loaded, family):
    model, routed = loaded(family)
    report = model.report
    assert isinstance(report, ArtifactReport)
    data = json.loads(json.dumps(report.to_dict()))
    assert set(data["programs"]) == set(PROGRAMS)
    assert data["limits"] == {"batch": 9, "length": 96, "image_tokens": 32}
    assert data["routing"]["decision_layers"] == list(routed.routing_config.decision_layers)
    assert data["bytes"] == sum(
        p.stat().st_size for p in report.path.rglob("*") if p.is_file() and p.name != "manifest.json"
    )
    text = str(report)
    for word in (*PROGRAMS, type(unrouted_model(family)).__name__, "pixel_values", "float32", "32 tokens in"):
        assert word in text


def test_the_processor_travels(loaded):
    model, _ = loaded("llava")
    assert model.processor.tokenizer.decode([5, 9]) == "w5 w9"


@QWEN
def test_without_a_processor_none_travels(loaded):
    assert loaded("qwen")[0].processor is None


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (SINGLE * 10, r"10 rows.*limits.batch=9"),
        ([[1, *[5] * 96]], r"97 tokens in a row.*limits.length=96"),
    ],
)
@torch.no_grad()
def test_limits_of_a_prompt(loaded, family, rows, match, way):
    model, _ = loaded(family)
    inputs = batch(family, *rows)
    with pytest.raises(InputError, match=match):
        model(**inputs) if way == "forward" else model.generate(**inputs, max_new_tokens=1)


@QWEN
@torch.no_grad()
def test_limits_of_a_picture(loaded):
    model, _ = loaded("qwen")
    row = [1, 5, *[IMAGE] * 36, 9]
    inputs = batch("qwen", row)
    inputs |= {"pixel_values": torch.zeros(144, 96), "image_grid_thw": torch.tensor([[1, 12, 12]])}
    with pytest.raises(InputError, match=r"36 visual tokens in a picture.*limits.image_tokens=32"):
        model(**inputs)


@torch.no_grad()
def test_limits_of_an_answer(loaded, family):
    model, routed = loaded(family)
    inputs = batch(family, *SINGLE)
    length = inputs["input_ids"].shape[1]
    with pytest.raises(InputError, match=r"limits.length=96.*max_new_tokens"):
        model.generate(**inputs, max_new_tokens=98 - length)
    whole = [
        new_tokens(each, inputs, max_new_tokens=97 - length, do_sample=False) for each in (model, routed)
    ]
    assert torch.equal(*whole)
    cache = model(**inputs).past_key_values
    with pytest.raises(InputError, match=r"limits\.length=96"):
        model(input_ids=torch.full((1, 97 - length), 5), past_key_values=cache)
    assert cache.get_seq_length() == length


@torch.no_grad()
def test_what_does_not_fit_is_refused(loaded, family):
    model, routed = loaded(family)
    inputs = batch(family, *SINGLE)
    wrong = {**inputs, "pixel_values": inputs["pixel_values"][..., :-1]}
    with pytest.raises(InputError, match=r"pixel_values has shape|are due there have"):
        model(**wrong)
    cache = routed(**inputs).past_key_values
    with pytest.raises(InputError, match="made by"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)
    filled = unrouted_model(family)(**batch(family, *TEXT)).past_key_values
    with pytest.raises(InputError, match="made by another model"):
        model(input_ids=torch.tensor([[5]]), past_key_values=filled)
    with pytest.raises(InputError, match="output_attentions"):
        model(**inputs, output_attentions=True)
    with pytest.raises(TypeError, match="position_ids"):
        model(**inputs, position_ids=torch.zeros(1, 5))


@torch.no_grad()
def test_pictures_that_are_not_asked_for(loaded):
    model, _ = loaded("llava")
    inputs = batch("llava", *SINGLE)
    with pytest.raises(InputError, match="videos"):
        model(**inputs, pixel_values_videos=inputs["pixel_values"])


@QWEN
@torch.no_grad()
def test_grids_that_do_not_fit(loaded):
    model, _ = loaded("qwen")
    inputs = batch("qwen", *SINGLE)
    with pytest.raises(InputError, match="grids"):
        model(**{**inputs, "image_grid_thw": None})
    with pytest.raises(InputError, match="multiples of 2"):
        model(**{**inputs, "image_grid_thw": torch.tensor([[1, 64, 1]])})


def test_a_loaded_model_is_not_exported_again(loaded, tmp_path):
    model, _ = loaded("llava")
    with pytest.raises(reroute_fx.ConfigError, match=r"expected what reroute_fx\.compile returned"):
        reroute_fx.export(model, tmp_path / "again")


def test_it_can_be_loaded_twice(loaded, family, tmp_path_factory):
    """Two of one artifact share nothing that a call writes to."""
    first, second = (reroute_fx.load(artifact(tmp_path_factory, family)) for _ in range(2))
    inputs = batch(family, *SINGLE)
    before = new_tokens(first, inputs, max_new_tokens=5, do_sample=False)
    copied = copy.deepcopy(inputs)
    assert torch.equal(new_tokens(second, inputs, max_new_tokens=5, do_sample=False), before)
    assert all(torch.equal(inputs[name], copied[name]) for name in inputs)


def test_it_stays_where_it_is(loaded):
    model, _ = loaded("llava")
    assert model.to("cpu").to(torch.float32) is model
    for change in (model.half, lambda: model.to("meta"), model.double):
        with pytest.raises(InputError, match="can't be moved or cast"):
            change()


def test_it_is_saved_by_copying_its_folder(loaded, tmp_path):
    model, _ = loaded("llava")
    with pytest.raises(InputError, match=r"save_pretrained was called on a model from an artifact.*Copy"):
        model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="can't be pickled or copied"):
        copy.deepcopy(model)


@torch.no_grad()
def test_inputs_may_lie_in_memory_as_they_like(loaded, family):
    """Views, other strides, 32-bit ids, doubles: what a caller may pass as well as what a processor returns."""
    model, _ = loaded(family)
    inputs = batch(family, *MIXED)
    expected = model(**inputs)
    step = torch.tensor([[9], [10], [11]])
    following = model(input_ids=step, past_key_values=expected.past_key_values).logits
    strided = {
        "input_ids": inputs["input_ids"].int().T.contiguous().T,
        "attention_mask": inputs["attention_mask"].bool().T.contiguous().T,
        "pixel_values": inputs["pixel_values"].double().mT.contiguous().mT,
    }
    found = model(**{**inputs, **strided})
    assert torch.equal(found.logits, expected.logits)
    wide = torch.tensor([[0, 9], [0, 10], [0, 11]], dtype=torch.int32)[:, 1:]
    assert torch.equal(model(input_ids=wide, past_key_values=found.past_key_values).logits, following)
