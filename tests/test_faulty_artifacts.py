"""Whatever happens to an artifact, it works as it should or is refused, and none is lost."""

import copy
import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from artifacts import LIMITS, TIERS, artifact, remember, routed_at, sign
from conversations import NOISE, SINGLE, batch, unrouted_model
from suite_tiers import fewer

import reroute_fx
from reroute_fx import ArtifactError, BackendUnavailableError, CaptureError, ConfigError
from reroute_fx.artifact import exporting
from reroute_fx.artifact.manifest import NAME
from reroute_fx.lowering import weights
from reroute_fx.runtime.loaded_model import _routed

pytestmark = pytest.mark.usefixtures("one_thread", "no_gradients")
FAMILY = "llava"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Artifacts of two tiers."""
    folders = [artifact(tmp_path_factory, FAMILY, tier) for tier in TIERS[:2]]
    remember(folders[0], routed_at(FAMILY, TIERS[0]))
    return folders


@pytest.fixture
def copied(good, tmp_path):
    return Path(shutil.copytree(good[0], tmp_path / "copy"))


@pytest.fixture(scope="module")
def answers():
    inputs = batch(FAMILY, *SINGLE)
    with torch.no_grad():
        return {
            routed_at(FAMILY, tier).routing_config: routed_at(FAMILY, tier)(**inputs) for tier in TIERS[:2]
        }


def expect_works(folder, answers):
    """Load an artifact and ask it; returns its routing."""
    model = reroute_fx.load(folder)
    logits = model(**batch(FAMILY, *SINGLE)).logits
    assert (logits - answers[model.routing_config].logits).abs().max() < NOISE
    return model.routing_config


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def export_forever(target, tiers=TIERS[:2]):
    while True:
        for tier in tiers:
            reroute_fx.export(routed_at(FAMILY, tier), target, limits=LIMITS, overwrite=True)


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@fewer(gate=3, full=20, reason="each kill and what is loaded after it take 3 s")
def test_killed_at_any_moment_one_or_the_other_is_there(good, answers, tmp_path, rounds):
    target = tmp_path / "llava"
    start = time.perf_counter()
    reroute_fx.export(routed_at(FAMILY, TIERS[0]), target, limits=LIMITS)
    duration = time.perf_counter() - start
    draw, seen = random.Random(0), set()
    for number in range(rounds):
        tiers = TIERS[:2][:: 1 if number % 2 else -1]
        writer = multiprocessing.get_context("fork").Process(target=export_forever, args=(target, tiers))
        before = (target / NAME).stat().st_ino
        writer.start()
        time.sleep(draw.uniform(0, duration))
        if number in (1, 2):  # in these the new one is there, however slow the machine is
            wait_for(lambda before=before: (target / NAME).stat().st_ino != before)
        assert writer.is_alive()
        writer.kill()
        writer.join()
        seen.add(expect_works(target, answers))
    assert len(seen) == 2
    reroute_fx.export(routed_at(FAMILY, TIERS[0]), target, limits=LIMITS, overwrite=True)
    assert os.listdir(tmp_path) == ["llava"]


def test_killed_before_the_first_is_whole_none_is_there(good, answers, tmp_path):
    target = tmp_path / "llava"
    for seconds in (0, 0.1, 0.3, 0.6, 1, 1.5):
        writer = multiprocessing.get_context("fork").Process(target=export_forever, args=(target,))
        writer.start()
        time.sleep(seconds)
        if seconds == 1.5:
            wait_for(target.exists)
        writer.kill()
        writer.join()
        if target.exists():
            expect_works(target, answers)
            shutil.rmtree(target)


def test_every_file_is_verified(copied, answers):
    """A flipped byte at the start, in the middle and at the end of each."""
    for name in names(copied):
        path = copied / name
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            changed = bytearray(content)
            changed[place] ^= 0x10
            path.write_bytes(changed)
            with pytest.raises(ArtifactError):
                reroute_fx.load(copied)
        path.write_bytes(content)
    expect_works(copied, answers)


def test_every_file_is_missed(copied, answers):
    for name in names(copied):
        path = copied / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ArtifactError):
            reroute_fx.load(copied)
        path.unlink()
        with pytest.raises(ArtifactError):
            reroute_fx.load(copied)
        path.write_bytes(content)
    expect_works(copied, answers)


@pytest.mark.parametrize(
    "other",
    ["tier", pytest.param("model", marks=pytest.mark.full("compiling another model takes 150 s"))],
)
def test_files_of_another_artifact_are_noticed(copied, good, tmp_path_factory, answers, other):
    """Of another tier, where most files are the same, and of another model, where none is."""
    folder = good[1] if other == "tier" else artifact(tmp_path_factory, "qwen")
    for name in sorted({*names(copied), *names(folder)}):
        mine, theirs = copied / name, folder / name
        if not theirs.exists():
            continue
        content = mine.read_bytes() if mine.exists() else None
        shutil.copy(theirs, mine)
        same = content == theirs.read_bytes()
        is_whole = name == NAME and other == "tier" and not differing(good[0], good[1])
        if same or is_whole:
            expect_works(copied, answers)
        else:
            with pytest.raises(ArtifactError):
                reroute_fx.load(copied)
        mine.unlink() if content is None else mine.write_bytes(content)
    expect_works(copied, answers)


def differing(first, second):
    """Files but the manifest that two artifacts don't have in common."""
    return [
        name
        for name in names(first)
        if name != NAME and (first / name).read_bytes() != (second / name).read_bytes()
    ]


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["weights.safetensors", "programs/prefill_0.pt2", "programs/prefill.json"])
def test_pickles_are_not_read(copied, tmp_path, name):
    """In the place of a file, with a manifest that says so."""
    mark = tmp_path / "executed"
    (copied / name).write_bytes(pickle.dumps(Evil(mark)))
    sign(copied)
    with pytest.raises(ArtifactError):
        reroute_fx.load(copied)
    torch.save(Evil(mark), copied / name)
    sign(copied)
    with pytest.raises(ArtifactError):
        reroute_fx.load(copied)
    assert not mark.exists()


@pytest.mark.parametrize("where", [".", "processor"])
def test_code_of_configs_is_not_run(copied, tmp_path, where, answers):
    mark = tmp_path / "executed"
    folder = copied / where
    (folder / "evil.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil: pass\n"
    )
    for path in folder.glob("*.json"):
        if path.name == NAME:
            continue
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            targets = ("AutoConfig", "AutoProcessor", "AutoTokenizer", "AutoImageProcessor")
            content["auto_map"] = dict.fromkeys(targets, "evil.Evil")
            path.write_text(json.dumps(content))
    sign(copied)
    with suppress(ArtifactError):
        expect_works(copied, answers)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../outside.pt2", "/etc/hostname", "programs/../../outside.pt2"])
def test_paths_stay_inside(copied, tmp_path, name):
    (tmp_path / "outside.pt2").write_bytes((copied / "programs/prefill_0.pt2").read_bytes())

    def change(content):
        content["files"][name] = content["files"]["programs/prefill_0.pt2"]
        content["programs"]["prefill"]["files"][0] = name

    sign(copied, change)
    with pytest.raises(ArtifactError, match="stays in the artifact"):
        reroute_fx.load(copied)


def test_links_out_are_refused(copied, tmp_path):
    path = copied / "programs/prefill_0.pt2"
    path.rename(tmp_path / "outside.pt2")
    path.symlink_to(tmp_path / "outside.pt2")
    with pytest.raises(ArtifactError, match="is a link"):
        reroute_fx.load(copied)


def test_a_machine_that_does_not_fit_is_told(copied):
    sign(copied, lambda content: content["requirements"].update(torch_release="2.10.0"))
    with pytest.raises(ArtifactError, match=r"compiled for torch 2\.10\.0, but here is"):
        reroute_fx.load(copied)


def test_a_device_of_another_kind_is_told(copied):
    with pytest.raises(ArtifactError, match="compiled for device cpu"):
        reroute_fx.load(copied, device="meta")


def test_too_little_memory_is_told(copied, monkeypatch):
    monkeypatch.setattr("reroute_fx.artifact.requirements._free_bytes", lambda device: 1000)
    with pytest.raises(ArtifactError, match="GiB of weights"):
        reroute_fx.load(copied)


def test_what_is_missing_from_the_weights_is_named(copied):
    def change(content):
        schedule = json.loads((copied / "programs/head.json").read_text())
        schedule["weights"] = ["nobody.weight"]
        (copied / "programs/head.json").write_text(json.dumps(schedule))

    change({})
    sign(copied)
    with pytest.raises(ArtifactError, match=r"lacks the weight 'nobody\.weight' of head"):
        reroute_fx.load(copied)


@pytest.mark.parametrize("program", ["prefill", "embeddings", "images"])
def test_a_missing_program_is_named(copied, program):
    sign(copied, lambda content: content["programs"].pop(program))
    with pytest.raises(ArtifactError, match=f"no program '{program}'"):
        reroute_fx.load(copied)


@pytest.mark.parametrize(
    ("program", "message"),
    [("images", r"ONNX Runtime can't load .*images_0\.pt2"), ("prefill", "prefill has 2 files; expected 1")],
)
def test_other_formats_are_told(copied, program, message):
    sign(copied, lambda content: content["programs"][program].update(format="onnx"))
    with pytest.raises(ArtifactError, match=message):
        reroute_fx.load(copied)


def test_a_config_that_transformers_can_not_read_is_told(copied):
    (copied / "config.json").write_text(json.dumps({"model_type": "of another world"}))
    sign(copied)
    with pytest.raises(ArtifactError, match="AutoConfig can't read"):
        reroute_fx.load(copied)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fail if anything is traced."""
    monkeypatch.setattr("reroute_fx.artifact.exporting.trace", lambda routed: pytest.fail("traced"))


@pytest.mark.usefixtures("nothing_runs")
def test_what_exists_is_not_replaced_unasked(copied, answers):
    with pytest.raises(ArtifactError, match=r"exists.*overwrite=True"):
        reroute_fx.export(routed_at(FAMILY, TIERS[1]), copied)
    expect_works(copied, answers)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"format": "pickle"}, r"format is 'pickle'; expected one of"),
        ({"limits": 8}, r"limits is a int; expected reroute_fx\.Limits"),
        ({"processor": "clip"}, r"processor is a str; expected the processor"),
    ],
)
def test_arguments_are_checked_first(tmp_path, arguments, match):
    with pytest.raises(ConfigError, match=match):
        reroute_fx.export(routed_at(FAMILY, TIERS[0]), tmp_path / "new", **arguments)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("nothing_runs")
def test_only_routed_models_are_exported(tmp_path):
    with pytest.raises(ConfigError, match=r"routed is a Linear; expected what reroute_fx\.compile returned"):
        reroute_fx.export(torch.nn.Linear(2, 2), tmp_path / "new")


@pytest.mark.usefixtures("nothing_runs")
def test_onnx_of_bfloat16_is_refused(tmp_path):
    """ONNX Runtime on CPU has no such convolution, which it says when everything is converted."""
    routed = reroute_fx.compile(
        copy.deepcopy(unrouted_model(FAMILY)).bfloat16(), method="none", backend="eager"
    )
    with pytest.raises(ConfigError, match=r"bfloat16.*dtype=torch\.float32"):
        reroute_fx.export(routed, tmp_path / "new", format="onnx")
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("nothing_runs")
def test_a_missing_compiler_is_named(tmp_path):
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(BackendUnavailableError, match=r"No C\+\+ compiler.*apt install g\+\+"),
    ):
        reroute_fx.export(routed_at(FAMILY, TIERS[0]), tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_too_small_is_told_before_compiling(good, copied, monkeypatch, answers):
    usage = shutil.disk_usage(copied)._replace(free=1000)
    monkeypatch.setattr("reroute_fx.artifact.atomic_folder.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr(
        "reroute_fx.artifact.compiled_programs.package_region", lambda *_: pytest.fail("compiled")
    )
    with pytest.raises(ArtifactError, match="the disk is full"):
        reroute_fx.export(routed_at(FAMILY, TIERS[1]), copied, overwrite=True)
    expect_works(copied, answers)


@pytest.mark.parametrize("name", ["write_bytes", "write_text"])
def test_a_disk_that_fills_up_is_told(good, copied, monkeypatch, answers, name):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, name, full)
    with pytest.raises(ArtifactError, match="the disk is full"):
        reroute_fx.export(routed_at(FAMILY, TIERS[1]), copied, overwrite=True)
    monkeypatch.undo()
    expect_works(copied, answers)
    assert os.listdir(copied.parent) == [copied.name]


def test_weights_that_can_not_be_written_are_told(good, copied, monkeypatch, answers):
    """The system refuses files of more than 1000 bytes while they are written."""
    save = weights.save_file

    def limited(tensors, path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save(tensors, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(weights, "save_file", limited)
    with pytest.raises(ArtifactError, match="could not be written"):
        reroute_fx.export(routed_at(FAMILY, TIERS[1]), copied, overwrite=True)
    expect_works(copied, answers)


@pytest.mark.parametrize(
    ("program", "what"),
    [("head", "logits"), ("embeddings", "logits"), ("continuation", "logits"), ("images", "features")],
)
def test_an_artifact_that_answers_otherwise_is_not_handed_out(good, tmp_path, monkeypatch, program, what):
    """Programs that compute something else than the model's own code, such as scaled logits."""
    read = exporting.read_model

    def scaled(*given):
        model = read(*given)
        run = model._parts.programs[program]
        model._parts.programs[program] = lambda **inputs: {k: 1.01 * v for k, v in run(**inputs).items()}
        if program == "continuation":
            model._decoder.continuation = _routed(model._parts.programs[program])
        return model

    monkeypatch.setattr(exporting, "read_model", scaled)
    with pytest.raises(CaptureError, match=f"gives other {what}"):
        reroute_fx.export(routed_at(FAMILY, TIERS[0]), tmp_path / "new")
    assert os.listdir(tmp_path) == []
