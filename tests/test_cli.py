"""The command line, on published configurations without weights."""

import json
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from tiny_models import byte_tokenizer, llava_config
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

import reroute_fx
from reroute_fx import artifact, lowering
from reroute_fx.command_line import main as cli
from reroute_fx.command_line.main import app
from reroute_fx.config import routing_config as config
from reroute_fx.errors import ConfigError, InputError
from reroute_fx.loading.models_by_name import check_device, load_model
from reroute_fx.loading.prompts import make_batch, read_image
from reroute_fx.loading.sample_picture import picture

PUBLISHED = Path(__file__).parent / "published"
GIB = 2**30


ONE_MODEL = pytest.mark.full(
    "30 s and 60 s each in an interpreter of its own; the gate has the smallest model"
)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("name", "layers", "decision_layers", "teraflops"),
    [
        ("llava-1.5-7b", 32, [2, 7, 15, 23], 8.18),
        pytest.param("llava-1.5-13b", 40, [2, 9, 19, 29], 15.94, marks=ONE_MODEL),
        pytest.param("qwen2.5-vl-72b", 80, [5, 17, 37, 57], 87.50, marks=ONE_MODEL),
    ],
)
def test_inspect_needs_no_weights(name, layers, decision_layers, teraflops):
    command = [
        sys.executable,
        "-m",
        "reroute_fx.command_line.main",
        "inspect",
        str(PUBLISHED / f"{name}.json"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert len(report["tokens_per_layer"]) == layers
    assert report["config"]["decision_layers"] == decision_layers
    assert abs(report["average_tokens"] - 128) < 1
    assert report["unrouted"]["flops"] / 1e12 == pytest.approx(teraflops, abs=0.005)
    passes = {result["name"]: result for result in report["passes"]}
    assert passes["FindLayers"]["matched"] == layers
    assert passes["RouteStages"]["rewritten"] == layers - decision_layers[0]
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 4 * GIB


def test_inspect_prints_a_table(tmp_path):
    config = json.loads((PUBLISHED / "llava-1.5-7b.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 8, "hidden_size": 256, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("inspect", str(tmp_path), "--tier", "0.5", "--visual-tokens", "100", "--text-tokens", "10")
    assert result.exit_code == 0
    assert "100 visual and 10 text tokens" in result.stdout
    assert "LlavaForConditionalGeneration" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere/config.json"], "ConfigError: model is 'nowhere/config.json'"),
        (["inspect", str(PUBLISHED / "llava-1.5-7b.json"), "--tier", "100"], "ConfigError: tier is 100"),
        (
            ["inspect", str(PUBLISHED / "llava-1.5-7b.json"), "--action", "drop"],
            "ConfigError: action is 'drop'",
        ),
        (["demo", "--backend", "tpu"], "ConfigError: backend is 'tpu'"),
    ],
)
def test_errors_are_one_clear_line(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "llava", "--visual-tokens", "0"],
        ["bench", "demo", "--rounds", "many"],
        ["run", "artifact", "--prompt", "What?"],
        ["visualize", "demo", "out", "--prompt", "What?"],
        ["prune", "demo"],
    ],
)
def test_wrong_usage_has_its_own_exit_code(arguments):
    """So has a command that needs a picture and was given none."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr
    if "--prompt" in arguments:
        assert "Missing option '--image'" in result.stderr


def test_the_choices_in_the_help_are_those_of_the_package():
    assert cli.ACTIONS == reroute_fx.passes.ACTIONS
    assert cli.BACKENDS == lowering.BACKENDS
    assert cli.FORMATS == artifact.FORMATS
    assert cli.SCHEDULES == config.SCHEDULES


PRINT_MODULES = "; import json, sys; print(json.dumps([*sys.modules]), file=sys.stderr)"


def modules_after(code):
    """What a fresh interpreter has imported, and the seconds that it computed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code + PRINT_MODULES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return set(json.loads(done.stderr)), seconds


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"], ["--version"]])
def test_help_does_not_wait_for_torch(arguments):
    """Computing for less than a second: how long that takes depends on who else computes."""
    modules, seconds = modules_after(
        f"from reroute_fx.command_line.main import app; app({arguments}, standalone_mode=False)"
    )
    assert not {"torch", "transformers", "numpy"} & modules
    _, bare = modules_after("pass")
    assert seconds - bare < 1


def test_the_version_is_printed():
    assert run("--version").stdout.strip() == metadata.version("reroute-fx")


def test_a_text_model_is_refused(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("inspect", str(tmp_path))
    assert result.exit_code == 1
    assert "UnsupportedModelError" in result.stderr


def test_configs_lists_the_release():
    records = json.loads(run("configs", "--json").stdout)
    assert [r["name"] for r in records] == [entry.name for entry in reroute_fx.paper_configs()]
    table = run("configs").stdout
    assert "84.1" in table
    assert "llava15, 7B decoder" in table
    assert table.count("baseline") == 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny LLaVA with weights and a processor: 16 visual tokens for each picture."""
    folder, tokenizer = tmp_path_factory.mktemp("checkpoint"), byte_tokenizer()
    torch.manual_seed(0)
    config = llava_config(4, spread=0.5)
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    config.text_config.vocab_size = len(tokenizer)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder


def validated(path):
    schema = json.loads((Path(__file__).parent / "bench.schema.json").read_text())
    results = json.loads(path.read_text())
    jsonschema.validate(results, schema, jsonschema.Draft202012Validator)
    return results


@pytest.mark.usefixtures("one_thread")
def test_bench_measures_every_batch(checkpoint, tmp_path):
    out = {"--json": tmp_path / "times.json", "--plot": tmp_path / "times.png"}
    files = [str(word) for pair in out.items() for word in pair]
    amounts = ["--batch", "1,2", "--rounds", "1", "--new-tokens", "2", "--tier", "0.5", "--backend", "eager"]
    result = run("bench", str(checkpoint), *amounts, *files)
    assert result.exit_code == 0, result.stderr
    results = validated(out["--json"])
    assert [r["visual_tokens"] for r in results] == [[16], [16, 16]]
    assert {r["new_tokens"] for r in results} == {2}
    assert result.stdout.count("decode, per token: milliseconds, 2 samples") == 2
    assert "The pictures are generated ones; --image takes your own." in result.stderr
    with Image.open(out["--plot"]) as plot:
        assert len(plot.getcolors(2**24)) > 10


def test_bench_asks_as_the_model_was_taught(checkpoint, tmp_path):
    picture(3).save(tmp_path / "cat.png")
    loaded = load_model(str(checkpoint), "cpu", "bfloat16")
    tokenizer = loaded.processor.tokenizer

    def asked(image):
        inputs = make_batch(loaded.processor, loaded.model, 2, "What?", image)
        assert inputs["pixel_values"].dtype == loaded.model.dtype == torch.bfloat16
        same = torch.equal(*inputs["pixel_values"])
        return tokenizer.decode(inputs["input_ids"][1]).replace("<image>" * 16, "[picture]"), same

    assert asked(None) == ("USER: [picture]\nWhat? ASSISTANT:", False)
    part = "{{ '<image>' if part.type == 'image' else part.text }}"
    loaded.processor.chat_template = f"{{% for part in messages[0].content %}}{part}{{% endfor %}} Answer:"
    assert asked(read_image(tmp_path / "cat.png")) == ("[picture]What? Answer:", True)


def test_bench_knows_the_demo():
    demo = load_model("demo", "cpu", "auto")
    inputs = make_batch(demo.processor, demo.model, 1, "Where is the star?", None)
    assert (inputs["input_ids"] == demo.model.config.image_token_id).sum() == 144


@pytest.mark.full("22 s; the wheel check runs the demo, and test_visualize.py draws")
def test_demo_asks_compares_and_draws(tmp_path):
    """The same answer from both unrouted models, a right box from the routed one, and pictures."""
    result = run("demo", "--backend", "eager", "--out", str(tmp_path / "demo"))
    assert result.exit_code == 0
    lines = re.findall(
        r"│ (unrouted, eager|unrouted|deleted|routed) +│ (.*?) +│ +(\d\.\d\d) │", result.stdout
    )
    answers = {name: (answer, float(shared)) for name, answer, shared in lines}
    assert len(answers) == 4
    assert answers["unrouted"] == answers["unrouted, eager"]
    assert answers["unrouted"][1] > 0.5
    assert answers["routed"][1] > 0.5
    for name in ("prompt-0.png", "index.html"):
        assert (tmp_path / "demo" / name).stat().st_size > 10_000


@pytest.mark.full("20 s; the wheel check runs the demo where there is no matplotlib")
def test_demo_succeeds_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("demo", "--backend", "eager", "--out", str(tmp_path / "demo"))
    assert result.exit_code == 0
    assert "Same model, same question" in result.stdout
    told = " ".join(result.stdout.split())
    assert "Pictures are left out: matplotlib is not installed" in told
    assert "pip install 'reroute-fx[bench]'" in told
    assert not (tmp_path / "demo").exists()


def test_demo_refuses_before_it_loads_anything(tmp_path, monkeypatch):
    monkeypatch.setattr("reroute_fx.command_line.demo.load_model", lambda *a: pytest.fail("loaded"))
    (tmp_path / "file").write_text("mine")
    for arguments, message in (
        (["--scene", "-1"], "ConfigError: scene is -1; expected 0 or more."),
        (["--out", str(tmp_path / "file")], "a file; expected a folder, or a name that is free."),
    ):
        result = run("demo", *arguments)
        assert result.exit_code == 1
        assert message in result.stderr.replace("\n", "")


def test_words_that_the_model_does_not_know_are_named():
    demo = load_model("demo", "cpu", "auto")
    with pytest.raises(InputError, match=r"prompt has \['tiny', 'unicorn\?'\], for which .* has no token"):
        make_batch(demo.processor, demo.model, 1, "Where is the tiny red unicorn?", None)


def test_turned_pictures_are_put_upright(tmp_path):
    """A camera held sideways writes the picture as it lay, and how to turn it."""
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    read = read_image(tmp_path / "turned.jpg")
    assert read.size == (32, 16)
    assert np.abs(np.asarray(read, int) - np.asarray(upright, int)).mean() < 5


def test_pictures_of_other_modes(tmp_path):
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        path = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        picture(0).convert(mode).save(path)
        assert read_image(path).mode == "RGB"
    Image.new("I;16", (8, 8), 60000).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep.png' of mode 'I;16'; expected 8 bits"):
        read_image(tmp_path / "deep.png")


def test_broken_pictures(tmp_path):
    whole = tmp_path / "whole.jpg"
    picture(0).save(whole)
    for name, content in (
        ("cut.jpg", whole.read_bytes()[:2000]),
        ("no.jpg", b"no picture"),
        ("empty.jpg", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}'; expected a picture that can be read"):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0,2"], "ConfigError: batch is '0,2'"),
        (["--batch", "1,x"], "ConfigError: batch is '1,x'"),
        (["--tier", "100"], "ConfigError: tier is 100"),
        (["--method", "magic"], "ConfigError: method is 'magic'"),
        (["--backend", "tpu"], "ConfigError: backend is 'tpu'"),
        (["--device", "tpu"], "ConfigError: device is 'tpu'; expected cpu, cuda, or cuda:N"),
        (["--device", "cuda:one"], "ConfigError: device is 'cuda:one'"),
        (["--backend", "tensorrt"], "BackendUnavailableError: backend is 'tensorrt'"),
        (["--dtype", "int8"], "ConfigError: dtype is 'int8'"),
        (["--image", "nowhere.png"], "InputError: image is 'nowhere.png'"),
        (["--image", __file__], "InputError: image is"),
        (["--json", "nowhere/times.json"], "InputError: path is 'nowhere/times.json'"),
        (["--plot", "times.xyz"], "InputError: path is 'times.xyz'"),
    ],
)
def test_bench_refuses_before_it_loads_anything(checkpoint, monkeypatch, arguments, message):
    monkeypatch.setattr("reroute_fx.loading.models_by_name.load_model", lambda *a: pytest.fail("loaded"))
    result = run("bench", str(checkpoint), *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_bench_without_a_gpu_says_so(checkpoint):
    for device in ("cuda", "cuda:1"):
        result = run("bench", str(checkpoint), "--device", device)
        assert result.exit_code == 1
        assert f"device is '{device}', but torch finds no GPU" in result.stderr


def test_the_number_of_a_gpu_is_kept_and_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cpu", "cuda", "cuda:0", "cuda:1"):
        check_device(device, "auto")
    with pytest.raises(ConfigError, match="device is 'cuda:2', but torch finds 2 GPUs"):
        check_device("cuda:2", "auto")


def test_bench_needs_weights_and_an_existing_model(checkpoint, tmp_path):
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    for model in (tmp_path, tmp_path / "nowhere"):
        result = run("bench", str(model), "--tier", "0.5")
        assert result.exit_code == 1
        assert f"ConfigError: model is '{model}'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "zip"], "ConfigError: format is 'zip'"),
        (["--format", "onnx"], "BackendUnavailableError: onnxscript is not installed"),
        (["--format", "tensorrt"], "BackendUnavailableError: backend is 'tensorrt'"),
    ],
)
def test_export_refuses_before_it_loads_anything(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr("reroute_fx.loading.models_by_name.load_model", lambda *a: pytest.fail("loaded"))
    result = run("export", str(checkpoint), str(tmp_path / "out"), *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("one_thread")
def test_visualize_draws_a_prompt(checkpoint, tmp_path):
    picture(1).save(tmp_path / "cat.png")
    options = [
        "--prompt",
        "What is that?",
        "--image",
        str(tmp_path / "cat.png"),
        "--tier",
        "0.5",
        "--new-tokens",
        "3",
    ]
    result = run("visualize", str(checkpoint), str(tmp_path / "out"), *options)
    assert result.exit_code == 0, result.stderr
    assert "index.html" in result.stdout
    page = (tmp_path / "out" / "index.html").read_text()
    assert "USER: What is that? ASSISTANT:" in page
    with Image.open(tmp_path / "out" / "prompt-0.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(2**24)) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png"], "InputError: image is 'nowhere.png'"),
        (["--tier", "100"], "ConfigError: tier is 100"),
        (["--device", "tpu"], "ConfigError: device is 'tpu'"),
    ],
)
def test_visualize_refuses_before_it_loads_anything(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("reroute_fx.loading.models_by_name.load_model", lambda *a: pytest.fail("loaded"))
    picture(0).save(tmp_path / "cat.png")
    needed = ["--prompt", "What?", "--image", str(tmp_path / "cat.png")]
    result = run("visualize", str(checkpoint), str(tmp_path / "out"), *needed, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_tasks_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run("tasks", str(tmp_path / "tasks"))
    assert result.exit_code == 1
    assert "BackendUnavailableError: datasets is not installed" in result.stderr
    assert "reroute-fx[eval]" in result.stderr
    assert not (tmp_path / "tasks").exists()
