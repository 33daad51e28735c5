"""`benchmarks/gpu.py` runs on CPU with tiny sizes, so that it runs when there is a GPU."""

import ast
import functools
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import reroute_fx
from reroute_fx import RoutingConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SECTIONS = ("checks", "models", "kernels", "attention", "artifacts")
TIMES = ("first_token", "first_token_without_tower", "decode_step", "generate")


DRY_RUN = pytest.mark.full("a dry run takes 40 s; arguments and imports are tested in the gate")


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What a dry run writes."""
    folder = tmp_path_factory.mktemp("results")
    # One model: the other one is built below.
    options = [
        "--dry-run",
        "--backend",
        "eager",
        "--models",
        "llava-1.5-7b",
        "--output-json",
        folder / "gpu.json",
    ]
    command = [sys.executable, BENCHMARKS / "gpu.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "gpu.json").read_text())


@pytest.fixture
def gpu(benchmark_module):
    return benchmark_module("gpu")


class Clock:
    """Goes on when something is done."""

    now = 0.0

    def __call__(self):
        return self.now


TITLES = [f"models {name}, batch {batch}" for name in ("llava-1.5-7b", "qwen2.5-vl-7b") for batch in (8, 1)]
ORDER = ["checks", *TITLES[:2], "kernels", "attention", *TITLES[2:], "artifacts"]


@pytest.mark.parametrize(
    ("seconds", "sections", "left_out"),
    [
        (700, SECTIONS, []),
        (540, SECTIONS, ["artifacts"]),
        (240, SECTIONS, ["models llava-1.5-7b, batch 1", "attention", *TITLES[2:], "artifacts"]),
        (41, ["checks", "kernels"], ["kernels"]),
        (81, ["kernels", "models"], TITLES),
    ],
)
def test_what_matters_most_comes_first_and_what_is_left_out_is_told(gpu, seconds, sections, left_out):
    """With a stand-in clock, on which each step takes as long as it is expected to, and checks twice as long."""
    clock = Clock()
    run = gpu.Run(torch.device("cpu"), torch.float32, False, None, seconds, clock)
    steps = gpu.in_order(run, None, list(sections), ["llava-1.5-7b", "qwen2.5-vl-7b"], [8, 1], "eager")

    def pass_time(step):
        clock.now += step.seconds * (2 if step.name == "checks" else 1)

    run.take([replace(step, run=functools.partial(pass_time, step)) for step in steps])
    wanted = [name for name in ORDER if name.split()[0] in sections]
    assert [step.name for step in steps] == wanted
    assert run.record["steps"] == [name for name in wanted if name not in left_out]
    assert [entry["step"] for entry in run.record["left_out"]] == left_out
    assert all(" s left, " in entry["why"] for entry in run.record["left_out"])


def test_a_contender_that_needs_more_memory_than_is_free_is_left_out(gpu, monkeypatch):
    run = gpu.Run(torch.device("cpu"), torch.float32, True, None, 60)
    monkeypatch.setattr(gpu, "free_bytes", lambda device: 1000)
    assert run.has_room("routed 128", 999)
    assert not run.has_room("eager", 1000)
    assert run.record["left_out"] == [{"step": "eager", "why": "1000 bytes free, 1000 needed"}]


def test_a_step_that_fails_does_not_cost_the_others(gpu):
    run = gpu.Run(torch.device("cpu"), torch.float32, True, None, 60)
    done = []
    run.take([gpu.Step("checks", lambda: 1 / 0), gpu.Step("kernels", lambda: done.append("kernels"))])
    assert (done, run.record["errors"][0]["where"]) == (["kernels"], "checks")


def test_it_imports_what_the_package_depends_on_and_nothing_else():
    """What an image lacks has to be carried to it."""
    own = {path.stem: path for folder in (BENCHMARKS, Path(__file__).parent) for path in folder.glob("*.py")}
    seen, left = {"gpu"}, ["gpu"]
    while left:
        for node in ast.walk(ast.parse(own[left.pop()].read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found = {name.partition(".")[0] for name in names} - seen
            seen |= found
            left += found & own.keys()
    dependencies = metadata.requires("reroute-fx")
    needed = {re.match(r"[\w-]+", line)[0] for line in dependencies if "extra ==" not in line}
    # Tokenizers come with transformers, and Triton with torch where there is a GPU.
    assert seen - own.keys() - set(sys.stdlib_module_names) <= needed | {"reroute_fx", "tokenizers", "triton"}


def test_many_launches_are_timed_as_one(benchmark_module, monkeypatch):
    """With a stand-in clock, on which a launch takes a microsecond. Inputs take turns."""
    measuring, called = benchmark_module("gpu_kernels"), []

    def seconds(run):
        before = len(called)
        run()
        return 1e-6 * (len(called) - before)

    monkeypatch.setattr(measuring, "call_seconds", seconds)
    runs = [functools.partial(called.append, number) for number in range(3)]
    assert measuring.launch_seconds(runs, torch.device("cpu")) == pytest.approx(1e-6)
    assert measuring.LAUNCHES >= 20
    assert called[: measuring.LAUNCHES] == [number % 3 for number in range(measuring.LAUNCHES)]


def test_launches_have_inputs_of_their_own_until_the_cache_is_full(benchmark_module, monkeypatch):
    measuring = benchmark_module("gpu_kernels")
    monkeypatch.setattr(measuring, "_arguments", lambda name, shape, device, dtype, seed: seed)
    properties = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def sets(name, batch, visual):
        shape = measuring.Shape("", batch, visual, 64, 4096, 32, 32, 128, 0.25)
        return len(measuring._sets(name, shape, torch.device("cuda"), torch.bfloat16))

    assert sets("select_tokens", 1, 576) == measuring.LAUNCHES
    assert sets("compact_tokens", 1, 576) == measuring.LAUNCHES
    # 8 * 208 rows of 8 KiB are read and written, 26 MiB, and their angles, 1.6 MiB: six of them are three caches.
    assert sets("compact_tokens", 8, 576) == 6
    assert sets("compact_tokens", 32, 2304) == 3


@pytest.mark.full("20 s: a compiler runs; the dry run does it too")
def test_what_inductor_runs_is_the_operator(benchmark_module):
    measuring, cpu = benchmark_module("gpu_kernels"), torch.device("cpu")
    (shape,) = measuring.kernel_shapes(tiny=True)
    for name in measuring.COMPILED:
        arguments = measuring._arguments(name, replace(shape, visual=64, text=9), cpu, torch.float32, seed=1)
        region = measuring._compiled(name, replace(shape, batch=3), cpu, torch.float32)
        expected = getattr(torch.ops.reroute, name)(*arguments)
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        torch.testing.assert_close(list(region(*measuring._tensors(name, arguments))), list(expected))
        assert len(region.compiled) == 1


@DRY_RUN
def test_nothing_failed_or_was_left_out(record):
    assert (record["errors"], record["left_out"]) == ([], [])
    assert record["run"]["finished"]
    assert record["environment"]["torch"] == torch.__version__


@DRY_RUN
def test_checks_were_made(record):
    calls = record["checks"]["kernels"]["calls"]
    assert set(calls) == {"visual_scores", "select_tokens", "compact_tokens", "restore_tokens"}
    assert min(calls.values()) >= 6
    assert {name.split("/")[0] for name in record["checks"]["golden"]} == {"llava", "qwen2_5_vl"}


@DRY_RUN
def test_kernels_were_measured(record):
    (rows,) = record["kernels"].values()
    assert set(rows) == {"visual_scores", "select_tokens", "compact_tokens", "restore_tokens_"}
    for name, row in rows.items():
        assert min(row.values()) > 0
        assert ("inductor_microseconds" in row) == (name != "restore_tokens_")


@DRY_RUN
def test_attention_was_measured_as_programs_name_it_and_as_pytorch_chooses(record):
    (rows,) = record["attention"].values()
    assert set(rows) == {"prompt", "prompt, active tokens", "step", "step, groups not folded"}
    for row in rows.values():
        assert row["largest_difference"] < 1e-5
        for choice in (row["pinned"], row["default"]):
            assert len(choice["new_lengths_microseconds"]) == 12
            assert min(choice["microseconds"], *choice["new_lengths_microseconds"]) > 0


@DRY_RUN
def test_artifacts_were_loaded(record):
    facts = record["artifacts"]["llava"]
    assert facts["difference"] < 1e-3
    assert facts["bytes"] > facts["weight_bytes"] > 0
    assert record["tensorrt"]["llava"]["left"] == []


@DRY_RUN
def test_models_were_measured(record):
    assert len(record["models"]) == 1
    for rows in record["models"].values():
        assert set(rows) == {
            "eager",
            "compiled unrouted",
            *(f"{kind} {tier}" for kind in ("routed", "hooks") for tier in (192, 128, 64)),
        }
        for name, row in rows.items():
            assert all(row[measure]["p50_ms"] > 0 for measure in TIMES)
            if "routed" in name and "un" not in name:
                assert row["theoretical_speedup"] > 1
                assert row["prefill_floor_ms"] > 0


@pytest.mark.full("14 s in an interpreter of its own; no product code")
def test_a_machine_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no GPU" in done.stderr


@pytest.fixture(params=["llava-1.5-7b", "qwen2.5-vl-7b"])
def setting(request, benchmark_module):
    """The benchmark's tiny model and a prompt for it."""
    gpu_models = benchmark_module("gpu_models")
    chosen = gpu_models.SETTINGS[request.param]
    model = chosen.build(torch.device("cpu"), torch.float32, True)
    _, inputs = next(iter(chosen.prompts(model, 2, True)))
    return gpu_models, model, inputs


@pytest.mark.parametrize("tier", [192, 64])
@pytest.mark.full("11 s each; what is compared with is no product code")
def test_the_hook_routing_computes_the_same(setting, tier):
    """Routing in plain eager PyTorch, written from the method alone: the same answers as the compiled graph."""
    gpu_models, model, inputs = setting
    config = RoutingConfig.from_tier(tier, action="compact_route", num_layers=16)
    routed = reroute_fx.compile(model, config=config, backend="eager")
    with torch.no_grad():
        hooked = gpu_models.hook_routed(model, tier, inputs)(**inputs).logits
        expected, unrouted = routed(**inputs).logits, model(**inputs).logits
    # Float32 rounding of 16 layers; that of another selection is what routing changes.
    torch.testing.assert_close(hooked, expected, rtol=0, atol=1e-4)
    assert (unrouted - expected).abs().max() > 1e-2
