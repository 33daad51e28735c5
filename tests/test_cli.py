"""The command line, on published configurations without weights."""

import json
import logging
import re
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
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
from reroute_fx.command_line import options
from reroute_fx.command_line.artifact_commands import _limits
from reroute_fx.command_line.main import app
from reroute_fx.command_line.terminal import logged
from reroute_fx.config import routing_config as config
from reroute_fx.config.tuned_config import ModelKind, TuningFacts
from reroute_fx.errors import ConfigError, InputError
from reroute_fx.loading import models_by_name
from reroute_fx.loading.models_by_name import choose_device, load_model, name_of
from reroute_fx.loading.prompts import make_batch, read_image
from reroute_fx.loading.sample_picture import picture
from reroute_fx.tuning.divergence import Losses
from reroute_fx.tuning.tuned import Finalist, Tuned

PUBLISHED = Path(__file__).parent / "published"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
GIB = 2**30


PUBLISHED_MODEL = pytest.mark.full(
    "30 s and more in an interpreter of its own; the gate inspects the demo's model"
)


INSPECT_AND_TELL_PEAK = """
import atexit, resource, sys
from reroute_fx.command_line.main import app
atexit.register(lambda: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr))
app()
"""


def run(*arguments, columns=80):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, [str(argument) for argument in arguments])


def said(result):
    return " ".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize(
    ("name", "layers", "decision_layers", "teraflops"),
    [
        pytest.param("llava-1.5-7b", 32, [2, 7, 15, 23], 8.18, marks=PUBLISHED_MODEL),
        pytest.param("llava-1.5-13b", 40, [2, 9, 19, 29], 15.94, marks=PUBLISHED_MODEL),
        pytest.param("qwen2.5-vl-72b", 80, [5, 17, 37, 57], 87.50, marks=PUBLISHED_MODEL),
    ],
)
def test_inspect_needs_no_weights(name, layers, decision_layers, teraflops):
    report = inspected(name, layers)
    assert report["config"]["decision_layers"] == decision_layers
    assert report["unrouted"]["flops"] / 1e12 == pytest.approx(teraflops, abs=0.005)


@pytest.mark.full(
    "30 s to 3 min each in an interpreter of its own; published sizes of what the tests have tiny"
)
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen3-vl-8b", 36),
        ("qwen3-vl-235b-a22b", 94),
        ("gemma-3-27b", 62),
        ("internvl3.5-38b", 64),
        ("glm-4.6v", 46),
    ],
)
def test_inspect_of_what_fills_many_gpus_takes_little_memory(name, layers):
    report = inspected(name, layers)
    assert report["config"]["decision_layers"] == sorted(report["config"]["decision_layers"])
    assert report["routed"]["flops"] < report["unrouted"]["flops"]


def inspected(name, layers):
    """The report on a published config; the process that makes it takes less than 4 GiB."""
    command = [
        sys.executable,
        "-c",
        INSPECT_AND_TELL_PEAK,
        "inspect",
        str(PUBLISHED / f"{name}.json"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert int(done.stderr.split()[-1]) * 1024 < 4 * GIB
    assert len(report["tokens_per_layer"]) == layers
    assert abs(report["average_tokens"] - 128) < 1
    passes = {result["name"]: result for result in report["passes"]}
    assert passes["FindLayers"]["matched"] == layers
    assert passes["RouteStages"]["rewritten"] == layers - report["config"]["decision_layers"][0]
    return report


@pytest.mark.full("7 s; test_what_inspect_prints_is_a_configuration inspects")
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
        ["bench", "demo", "--num-iters", "many"],
        ["bench", "demo", "--warmup", "-1"],
        ["artifact", "run", "folder", "--prompt", "What?"],
        ["artifact", "export", "demo", "folder", "--max-batch-size", "0"],
        ["lmms", "tasks", "folder", "--num-prompts", "0"],
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
    assert options.ACTIONS == reroute_fx.passes.ACTIONS
    assert options.BACKENDS == lowering.BACKENDS
    assert options.FORMATS == artifact.FORMATS
    assert options.POOLS == config.POOLS
    assert options.SCHEDULES == config.SCHEDULES
    help_of_export = said(run("artifact", "export", "--help", columns=200))
    for name in models_by_name.DTYPES:
        assert name in help_of_export
    limits = reroute_fx.Limits()
    assert f"rows [default: ({limits.batch})]" in help_of_export
    assert f"up to {limits.length}" in help_of_export
    assert f"up to {limits.image_tokens}" in help_of_export


PRINT_MODULES = "; import json, sys; print(json.dumps([*sys.modules]), file=sys.stderr)"


def modules_after(code):
    """What a fresh interpreter has imported, and the seconds that it computed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code + PRINT_MODULES]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return set(json.loads(done.stderr)), seconds


@pytest.mark.parametrize("arguments", [["--help"], ["artifact", "export", "--help"], ["-h"], ["--version"]])
def test_help_does_not_wait_for_torch(arguments):
    """Computing for less than a second: how long that takes depends on who else computes."""
    code = f"from reroute_fx.command_line.main import app; app({arguments}, standalone_mode=False)"
    # The first time in a new environment it compiles bytecode.
    modules_after(code)
    modules, seconds = modules_after(code)
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
    records = json.loads(run("paper", "configs", "--json").stdout)
    assert [r["name"] for r in records] == [entry.name for entry in reroute_fx.paper_configs()]
    table = run("paper", "configs").stdout
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


@pytest.mark.full("15 s; test_benchmark.py measures, and the command in docs is run")
@pytest.mark.usefixtures("one_thread")
def test_bench_measures_every_batch(checkpoint, tmp_path):
    out = {"--output-json": tmp_path / "times.json", "--plot": tmp_path / "times.png"}
    files = [word for pair in out.items() for word in pair]
    amounts = ["--batch-size", "1,2", "--num-iters", 1, "--warmup", 0, "--max-new-tokens", 2]
    result = run("bench", checkpoint, *amounts, "--tier", 0.5, "--backend", "eager", *files)
    assert result.exit_code == 0, result.stderr
    results = validated(out["--output-json"])
    assert [r["visual_tokens"] for r in results] == [[16], [16, 16]]
    assert {(r["new_tokens"], r["rounds"], r["warmup"]) for r in results} == {(2, 1, 0)}
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


@pytest.mark.full("20 s; test_tune.py tunes and reads the file in the gate")
@pytest.mark.usefixtures("one_thread")
def test_tune_writes_what_config_takes(checkpoint, tmp_path):
    lines = []
    for seed in range(8):
        picture(seed).save(tmp_path / f"{seed}.png")
        lines.append(json.dumps({"image": f"{seed}.png", "text": f"Where is the star {seed}?"}))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    files = ["--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "tuned.json"]
    amounts = ["--trials", 2, "--max-new-tokens", 2, "--workers", 1, "--target-weight", 0.5]
    result = run("tune", checkpoint, "--tier", 0.5, *amounts, *files, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    assert "Plan: up to 2 trials" in result.stderr
    assert re.search(r"chosen.*reference", said(result))
    inspected = run("inspect", checkpoint, "--config", tmp_path / "tuned.json", "--json")
    written = json.loads((tmp_path / "tuned.json").read_text())
    assert json.loads(inspected.stdout)["config"] == written["config"]
    assert written["tuned"]["target_weight"] == 0.5


@pytest.mark.parametrize(("stopped", "code"), [("interrupted", 130), ("the time is up", 0)])
def test_an_interrupted_tune_writes_what_it_found_and_ends_with_130(
    checkpoint, tmp_path, monkeypatch, stopped, code
):
    config = reroute_fx.RoutingConfig((1,), (0.5,), method="rules", rules=(reroute_fx.AttentionRule(),))
    finalist = Finalist(config, 1.0, Losses((0.5,), (1.0,)), Losses((0.5,), (1.0,)))

    def tune(model, prompts, tier, **_):
        facts = TuningFacts(
            ModelKind.of(model.config), "LLaVA", tier, 2, 1, "0" * 64, 8, 0, {}, 0.5, 0.5, 1.0
        )
        return Tuned(config, (finalist,), finalist, (0.5,) * 8, facts, stopped)

    monkeypatch.setattr("reroute_fx.tuning.tune.tune", tune)
    picture(0).save(tmp_path / "star.png")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"image": "star.png", "text": "Where is the star?"}))
    result = run("tune", checkpoint, "--prompts", prompts, "--tier", 0.5, "-o", tmp_path / "tuned.json")
    assert result.exit_code == code, result.stderr
    assert f"Fewer trials: {stopped}." in said(result)
    loaded = load_model(str(checkpoint), "cpu", "float32").model
    routed = reroute_fx.compile(loaded, config=tmp_path / "tuned.json", backend="eager")
    assert routed.routing_config == config


@pytest.mark.full("22 s; the wheel check runs the demo, and test_visualize.py draws")
def test_demo_asks_compares_and_draws(tmp_path):
    """The same answer from both unrouted models, a right box from the routed one, and pictures."""
    result = run("demo", "--backend", "eager", "--output-dir", str(tmp_path / "demo"))
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
    result = run("demo", "--backend", "eager", "--output-dir", str(tmp_path / "demo"))
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
        (["--output-dir", str(tmp_path / "file")], "a file; expected a folder, or a name that is free."),
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
        (["--batch-size", "0,2"], "ConfigError: batch-size is '0,2'"),
        (["--batch-size", "1,x"], "ConfigError: batch-size is '1,x'"),
        (["--tier", "100"], "ConfigError: tier is 100"),
        (["--method", "magic"], "ConfigError: method is 'magic'"),
        (["--backend", "tpu"], "ConfigError: backend is 'tpu'"),
        (["--device", "tpu"], "ConfigError: device is 'tpu'; expected auto, cpu, cuda, or cuda:N"),
        (["--device", "cuda:one"], "ConfigError: device is 'cuda:one'"),
        (["--backend", "tensorrt"], "BackendUnavailableError: backend is 'tensorrt'"),
        (["--dtype", "int8"], "ConfigError: dtype is 'int8'"),
        (["--image", "nowhere.png"], "InputError: image is 'nowhere.png'"),
        (["--image", __file__], "InputError: image is"),
        (["--output-json", "nowhere/times.json"], "InputError: path is 'nowhere/times.json'"),
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
        assert choose_device(device, "auto") == device
    with pytest.raises(ConfigError, match="device is 'cuda:2', but torch finds 2 GPUs"):
        choose_device("cuda:2", "auto")


@pytest.mark.parametrize(("found", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_a_gpu_if_there_is_one(monkeypatch, found, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert choose_device("auto", "float32") == chosen


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
    result = run("artifact", "export", checkpoint, tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_limits_that_are_left_out_fit_those_that_are_given():
    defaults = reroute_fx.Limits(16, 2048, 2048)
    assert _limits(defaults, None, None, None) == defaults
    assert _limits(defaults, 2, 100, None) == reroute_fx.Limits(2, 100, 100)
    assert _limits(defaults, None, None, 64) == reroute_fx.Limits(16, 2048, 64)
    with pytest.raises(ConfigError, match=r"limits\.image_tokens is 64; expected at most limits\.length=32"):
        _limits(defaults, None, 32, 64)


@pytest.mark.full("10 s; visualizing/ has tests of its own")
@pytest.mark.usefixtures("one_thread")
def test_visualize_draws_a_prompt(checkpoint, tmp_path):
    picture(1).save(tmp_path / "cat.png")
    asked = ["--prompt", "What is that?", "--image", tmp_path / "cat.png", "--max-new-tokens", 3]
    result = run("visualize", checkpoint, tmp_path / "out", *asked, "--tier", 0.5)
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


def test_tasks_are_written(tmp_path):
    result = run("lmms", "tasks", tmp_path / "tasks", "--num-prompts", 2, "--seed", 1)
    assert result.exit_code == 0, result.stderr
    assert f"--include_path {tmp_path / 'tasks'}" in result.stdout
    assert "the paper's, llava: refcoco" in result.stdout
    assert len(list((tmp_path / "tasks").glob("*.yaml"))) > 2


def test_tasks_say_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    result = run("lmms", "tasks", tmp_path / "tasks")
    assert result.exit_code == 1
    assert "BackendUnavailableError: datasets is not installed" in result.stderr
    assert "reroute-fx[eval]" in result.stderr
    assert not (tmp_path / "tasks").exists()


# Profile


def test_profile_finds_the_layers_that_the_demo_was_grown_from(tmp_path):
    files = ["-o", tmp_path / "profile.json", "--plot", tmp_path / "profile.png"]
    result = run("profile", "demo", "--num-prompts", 8, "--batch-size", 8, "--max-new-tokens", 20, *files)
    assert result.exit_code == 0, result.stderr
    assert "8 prompts with 144 visual tokens, 22.2 % kept" in said(result)
    assert result.stdout.count("proposed, coverage 0.") == 3
    content = json.loads((tmp_path / "profile.json").read_text())
    by_layer = np.array(content["effect"]).sum(axis=1)
    assert sorted(np.argsort(-by_layer)[:4].tolist()) == [0, 4, 8, 12]
    assert by_layer[[0, 4, 8, 12]].sum() > 0.8
    with Image.open(tmp_path / "profile.png") as plot:
        assert len(plot.getcolors(2**24)) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["some/model"], "ConfigError: prompts are missing for model 'some/model'"),
        (["demo", "--prompts", "nowhere.jsonl"], "InputError: prompts is 'nowhere.jsonl'"),
        (["demo", "--tier", "100"], "ConfigError: tier is 100"),
        (["demo", "--device", "tpu"], "ConfigError: device is 'tpu'"),
        (["demo", "-o", "nowhere/profile.json"], "InputError: path is 'nowhere/profile.json'"),
        (["demo", "--plot", "profile.xyz"], "InputError: path is 'profile.xyz'"),
    ],
)
@pytest.mark.parametrize("command", [("profile",), ("tune", "-o", "tuned.json")])
def test_profile_and_tune_refuse_before_they_load_anything(
    tmp_path, monkeypatch, command, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reroute_fx.loading.models_by_name.load_model", lambda *a: pytest.fail("loaded"))
    result = run(*command, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


# Routing and model options, the same for every command that routes a model


ROUTED_BY = {
    "inspect": ("inspect", "demo"),
    "bench": ("bench", "demo"),
    "visualize": ("visualize", "demo", "out", "--prompt", "What?", "--image", "cat.png"),
    "export": ("artifact", "export", "demo", "out"),
}


def tuned_for_a_7b():
    """A tuned file, of a decoder of 32 layers."""
    content = json.loads((RESULTS / "tuned_128.json").read_text())
    content["tuned"]["model"] = {"type": "llava", "layers": 32, "width": 4096, "heads": 32}
    return content


@pytest.fixture(params=ROUTED_BY)
def routed_by(request, tmp_path, monkeypatch):
    """A command that routes a model, and would end the test if it loaded one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models_by_name, "load_model", lambda *a: pytest.fail("loaded"))
    monkeypatch.setattr("reroute_fx.api.capture_decoder", lambda _: pytest.fail("traced"))
    picture(0).save("cat.png")
    return ROUTED_BY[request.param]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tier", "100"], "ConfigError: tier is 100"),
        (["--method", "magic"], "ConfigError: method is 'magic'"),
        (["--action", "drop"], "ConfigError: action is 'drop'"),
        (["--schedule", "soon"], "ConfigError: schedule is 'soon'"),
        (["--pool", "sea"], "ConfigError: pool is 'sea'"),
        (
            ["--config", "none.json"],
            "ConfigError: config is 'none.json'; expected a JSON file with a RoutingConfig",
        ),
        (
            ["--config", "broken.json"],
            "ConfigError: broken.json: keep_ratio is [0.5], but a RoutingConfig has no such",
        ),
        (["--config", "deep.json"], "ConfigError: decision_layers has [99], but the decoder has 16 layers"),
        (
            ["--config", "tuned.json"],
            "ConfigError: tuned.json was tuned for a llava of 32 layers, 32 heads and width 4096, but the model is a "
            "llava of 16 layers",
        ),
        (
            ["--config", "good.json", "--pool", "row", "--tier", "64"],
            "ConfigError: config is given together with tier=64.0, pool='row'; expected one or the other.",
        ),
        (
            ["--revision", "v1"],
            "ConfigError: revision is 'v1', but model is 'demo', which is on this machine",
        ),
    ],
)
def test_routing_is_refused_before_a_model_is_loaded(routed_by, arguments, message):
    for name, content in (
        ("broken", {"decision_layers": [2], "keep_ratio": [0.5]}),
        ("deep", {"decision_layers": [2, 99], "keep_ratios": [0.5, 0.5]}),
        ("good", {"decision_layers": [2], "keep_ratios": [0.5]}),
        ("tuned", tuned_for_a_7b()),
    ):
        Path(f"{name}.json").write_text(json.dumps(content))
    result = run(*routed_by, *arguments)
    assert result.exit_code == 1
    assert message in said(result)
    assert "Traceback" not in said(result)


def test_what_inspect_prints_is_a_configuration(checkpoint, tmp_path):
    """That of all choices, and the same when it comes from a file."""
    choices = {
        "tier": 0.5,
        "method": "fastv",
        "action": "physical_delete",
        "schedule": "exact",
        "pool": "image",
    }
    given = [word for name, value in choices.items() for word in (f"--{name}", value)]
    report = json.loads(run("inspect", checkpoint, *given, "--json").stdout)
    expected = reroute_fx.RoutingConfig.from_tier(**choices, num_layers=4)
    assert report["config"] == expected.to_dict()
    assert report["config"]["pool"] == "image"
    (tmp_path / "config.json").write_text(json.dumps(report["config"]))
    result = run("inspect", checkpoint, "--config", tmp_path / "config.json", "--json")
    assert not result.stderr
    again = json.loads(result.stdout)
    assert again["config"] == report["config"]
    assert again["tokens_per_layer"] == report["tokens_per_layer"]


def test_the_schedule_reaches_the_routing():
    given = {"tier": 64, "method": "pdrop", "schedule": "paper"}
    config = models_by_name.read_routing("demo", **given)
    assert config == reroute_fx.RoutingConfig.from_tier(**given, num_layers=16)
    assert config != models_by_name.read_routing("demo", tier=64)


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """The cache of a hub with one model of two revisions, the newer one with more layers."""
    folder = tmp_path / "models--someone--tiny"
    for revision, commit, layers in (("main", "a" * 40, 6), ("v1", "b" * 40, 4)):
        snapshot = folder / "snapshots" / commit
        shutil.copytree(checkpoint, snapshot)
        content = json.loads((snapshot / "config.json").read_text())
        content["text_config"]["num_hidden_layers"] = layers
        (snapshot / "config.json").write_text(json.dumps(content))
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return "someone/tiny"


def test_a_revision_is_that_of_the_hub(hub):
    for revision, layers in ((None, 6), ("v1", 4)):
        config = models_by_name.read_routing(hub, revision, tier=0.5)
        assert config == reroute_fx.RoutingConfig.from_tier(0.5, num_layers=layers)
        assert (
            models_by_name.build_without_weights(hub, revision).config.text_config.num_hidden_layers == layers
        )
    loaded = load_model(hub, "cpu", "auto", "v1")
    assert len(loaded.model.model.language_model.layers) == 4
    for command in (("inspect",), ("bench",)):
        result = run(*command, hub, "--revision", "v9")
        assert result.exit_code == 1
        assert f"ConfigError: model is '{hub}' and revision 'v9'; expected" in result.stderr


# What is logged


def test_the_log_is_shown_from_a_level_on(capsys):
    logger = logging.getLogger("reroute_fx.lowering.executable")
    before = logging.getLogger("reroute_fx").handlers[:]
    for level, shown in (("info", ["first", "again"]), ("warning", ["again"]), ("error", [])):
        with logged(level):
            logger.info("first call")
            logger.warning("called again")
        printed = capsys.readouterr()
        assert [word for word in ("first", "again") if word in printed.err] == shown
        assert not printed.out
    assert logging.getLogger("reroute_fx").handlers == before


@pytest.mark.full("6 s")
def test_the_log_of_a_command_is_shown(checkpoint):
    told = said(run("--log-level", "debug", "inspect", checkpoint, "--tier", 0.5))
    assert "4 layers routed in" in told
    assert "FindLayers: 4 matched" in told
    result = run("--log-level", "loud", "methods")
    assert result.exit_code == 1
    assert "ConfigError: log-level is 'loud'; expected one of ['debug', 'info', 'warning', 'error']" in said(
        result
    )


# Help


COMMANDS = (
    "inspect",
    "methods",
    "profile",
    "tune",
    "demo",
    "visualize",
    "bench",
    "serve",
    "artifact export",
    "artifact show",
    "artifact run",
    "paper configs",
    "lmms tasks",
)


def test_the_help_leads_to_every_command():
    def below(name):
        shown = run(*name.split(), "--help").stdout
        return re.findall(r"^│ (\w+)  ", shown[shown.index("─ Commands ─") :], re.M)

    names = below("")
    groups = ("artifact", "paper", "lmms")
    found = [name for name in names if name not in groups]
    found += [f"{group} {name}" for group in groups for name in below(group)]
    assert found == list(COMMANDS)


@pytest.mark.parametrize("columns", [80, 100])
def test_help_breaks_no_words(columns):
    """Words stand whole in the help: what is broken in two can't be found in wider lines."""
    for command in COMMANDS:
        narrow = run(*command.split(), "--help", columns=columns).stdout
        wide = set(re.findall(r"[\w:|.-]+", run(*command.split(), "--help", columns=300).stdout))
        assert max(map(len, narrow.splitlines())) <= columns
        assert set(re.findall(r"[\w:|.-]+", narrow)) <= wide, command


@pytest.mark.parametrize(
    ("given", "name"),
    [("org/model", "org/model"), ("{folder}", "weights"), (None, "")],
    ids=["id", "folder", "none"],
)
def test_a_model_s_name_holds_no_path_of_this_machine(given, name, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    assert name_of(SimpleNamespace(name_or_path=given and given.format(folder=folder))) == name
