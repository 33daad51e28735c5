"""Artifacts on the command line: export, show, run."""

import io
import json
import subprocess
import sys

import pytest
import torch
from artifacts import TIERS, artifact, processor, remember, routed_at
from conversations import unrouted_model
from PIL import Image
from rich.console import Console
from suite_tiers import share
from typer.testing import CliRunner

import reroute_fx
from reroute_fx.artifact import exporting
from reroute_fx.command_line.main import app
from reroute_fx.grounding.scenes import scene
from reroute_fx.loading.models_by_name import load_model
from reroute_fx.loading.prompts import make_batch, read_image
from reroute_fx.runtime.loaded_model import PROGRAMS

TIER = str(TIERS[0])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model and its processor as users have them on disk."""
    folder = tmp_path_factory.mktemp("model")
    unrouted_model("llava").save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = artifact(tmp_path_factory, "llava")
    remember(folder, routed_at("llava", TIERS[0]))
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(path)
    return path


def invoke(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def said(result):
    return " ".join((result.stdout + result.stderr).split())


@pytest.mark.parametrize("format", share(["aot", "onnx"], ["aot"], "48 s; test_onnx.py exports"))
def test_from_a_folder_to_an_answer(model_folder, made, picture, tmp_path, format):
    out = tmp_path / "llava"
    limits = ("--max-batch-size", 2, "--max-length", 128, "--max-image-tokens", 16)
    done = invoke("artifact", "export", model_folder, out, "--tier", TIER, "--format", format, *limits)
    assert done.exit_code == 0, said(done)
    assert "2 rows, 128 tokens in a row, 16 tokens in a picture" in said(done)
    shown = invoke("artifact", "show", out, "--json")
    assert json.loads(shown.stdout)["format"] == format
    assert json.loads(shown.stdout)["limits"] == {"batch": 2, "length": 128, "image_tokens": 16}
    assert "LlavaForConditionalGeneration" in invoke("artifact", "show", out).stdout
    answered = invoke("artifact", "run", out, "--image", picture, "--prompt", "w9 w11", "--max-new-tokens", 5)
    assert answered.exit_code == 0, said(answered)
    loaded = reroute_fx.load(out)
    inputs = make_batch(loaded.processor, loaded, 1, "w9 w11", read_image(picture))
    with torch.no_grad():
        tokens = loaded.generate(**inputs, max_new_tokens=5, do_sample=False)
    expected = loaded.processor.tokenizer.decode(
        tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert answered.stdout.split() == expected.split()


@pytest.mark.full("70 s; the check itself is in test_faulty_artifacts.py, on a smaller model")
def test_the_model_that_ships_becomes_an_artifact(tmp_path):
    """Its projector cancels large values, so that rounding before it moves features more than rounding of them."""
    out, picture, text = tmp_path / "demo", tmp_path / "scene.png", "Where is the red circle?"
    done = invoke("artifact", "export", "demo", out, "--format", "onnx", "--dtype", "float32", "--tier", 128)
    assert done.exit_code == 0, said(done)
    scene("demo", 13).picture.save(picture)
    answered = invoke("artifact", "run", out, "--image", picture, "--prompt", text, "--max-new-tokens", 12)
    assert answered.exit_code == 0, said(answered)
    named = load_model("demo", "cpu", "float32")
    routed = reroute_fx.compile(named.model, tier=128, backend="eager")
    inputs = make_batch(named.processor, routed, 1, text, read_image(picture))
    tokens = routed.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = named.processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert len(expected) > 4
    assert answered.stdout.split() == expected.split()


@pytest.mark.full("17 s; test_artifact.py loads and runs where no model was imported")
def test_running_imports_no_model(made, picture):
    """Neither the command nor what it calls."""
    code = (
        "import sys; from reroute_fx.command_line.main import app\n"
        "try: app()\n"
        "finally: print([m for m in sys.modules if '.models.' in m and '.modeling_' in m and '.auto.' not in m])"
    )
    asked = ["--image", str(picture), "--prompt", "w9", "--max-new-tokens", "2"]
    command = [sys.executable, "-c", code, "artifact", "run", str(made), *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def bare(made, tmp_path_factory):
    """An artifact without a processor, and what the screen showed while it was made."""
    folder, screen = tmp_path_factory.mktemp("bare") / "new", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
        reroute_fx.export(routed_at("llava", TIERS[0]), folder, progress=True)
    return folder, screen.getvalue()


NOT_COMPILED = {"embeddings", "head"}
"""Programs of a single operator."""


def test_the_phases_of_an_export_show(bare):
    _, shown = bare
    phases = [
        "tracing",
        *(f"compiling {name}" for name in PROGRAMS if name not in NOT_COMPILED),
        "writing weights",
        "checking",
        "writing to disk",
    ]
    places = [shown.index(phase) for phase in phases]
    assert places == sorted(places)
    assert "/5" in shown
    assert not any(f"compiling {name}" in shown for name in NOT_COMPILED)


def test_an_artifact_is_replaced_only_when_asked(model_folder, made, tmp_path):
    out = tmp_path / "llava"
    out.mkdir()
    (out / "mine").write_text("")
    refused = invoke("artifact", "export", model_folder, out, "--tier", TIER)
    assert refused.exit_code == 1
    assert "which exists" in said(refused)
    assert (out / "mine").exists()
    done = invoke("artifact", "export", model_folder, out, "--tier", TIER, "--overwrite")
    assert done.exit_code == 0, said(done)
    assert not (out / "mine").exists()


def test_what_fails_is_said_in_a_line(model_folder, made, picture, tmp_path):
    ask = ("artifact", "run", made, "--prompt", "w9", "--image", picture)
    for arguments, match in (
        (("artifact", "show", tmp_path), "ArtifactError: "),
        (("artifact", "run", tmp_path, "--prompt", "w9", "--image", picture), "ArtifactError: "),
        (
            ("artifact", "run", made, "--prompt", "w9", "--image", tmp_path / "none.png"),
            "InputError: image is",
        ),
        ((*ask, "--device", "cuda"), "ArtifactError: "),
        ((*ask, "--device", "tpu:one"), "ConfigError: device is 'tpu:one'"),
        (("artifact", "run", made, "--prompt", " ".join(["w9"] * 90), "--image", picture), "InputError: "),
        (
            ("artifact", "export", model_folder, tmp_path / "new", "--tier", TIER, "--format", "zip"),
            "ConfigError: format is 'zip'",
        ),
        (
            ("artifact", "export", tmp_path, tmp_path / "new", "--max-length", 8, "--max-image-tokens", 9),
            "ConfigError: limits.image_tokens is 9; expected at most limits.length=8",
        ),
        (("artifact", "export", tmp_path, tmp_path / "new"), "ConfigError: model is"),
    ):
        failed = invoke(*arguments)
        assert failed.exit_code == 1, arguments
        assert match in said(failed)
        assert "Traceback" not in said(failed)
    assert not (tmp_path / "new").exists()


def test_an_artifact_without_a_processor_says_so(bare, picture):
    failed = invoke("artifact", "run", bare[0], "--prompt", "w9", "--image", picture)
    assert failed.exit_code == 1
    assert "has no processor; expected one. Export it with processor=" in said(failed)
