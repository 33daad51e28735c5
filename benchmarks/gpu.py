r"""Carry wheels of what an image with torch 2.11 and Triton 3.6 may lack: transformers (5.19), pydantic, typer, rich.

    pip download --only-binary :all: --dest wheels "transformers>=5.19,<5.24" pydantic typer rich jinja2 pillow
    pip install --no-index --find-links wheels transformers pydantic typer rich jinja2 pillow   # there
    pip install --no-deps -e .

The first command needs the Python of the image. Then all that needs a GPU, in two calls of nine minutes:

    python benchmarks/gpu.py --sections checks,models --models llava-1.5-7b --batch-size 8,1 --output-json llava.json
    python benchmarks/gpu.py --sections kernels,attention,models,artifacts --models qwen2.5-vl-7b --batch-size 8 \
        --output-json qwen.json

``checks``   every kernel on fresh random inputs against exact or float64 references, in poisoned memory; golden
             vectors on the device
``rates``    copy bandwidth and matrix rate, the floor of everything else
``kernels``  time of each operator at the sizes of 7B models, launched as an operator and by Inductor, next to the copy
             bandwidth and its eager composition
``attention``  the kernels of attention that programs name, next to PyTorch's own choice, also on new lengths
``models``   7B shapes with random weights: eager, `torch.compile`, this project's compiler without routing, the eager
             hook routing, and the three tiers with and without CUDA graphs; first token, decoding, whole answers,
             peak memory, the floor, the share of routing's kernels, and whether anything makes the host wait
``artifacts``  golden models as artifacts that are exported and loaded here, and on TensorRT where it is installed

Steps run in the order in which they matter: checks, the first model, kernels, attention, the other models, artifacts.
One that the time or the memory that is left would not suffice for is left out, with the reason. What was measured is
written after every step, so that a run that is cut short keeps it. ``--dry-run`` goes through everything on CPU with
tiny sizes; it writes only into a file that is named.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from gpu_artifacts import check_artifact, check_engines, subject
from gpu_attention import CHOICES, measure_attention
from gpu_checks import run_checks
from gpu_golden import MODELS, check_golden
from gpu_kernels import Rates, kernel_shapes, measure_kernels, measure_rates
from gpu_models import SETTINGS, TIERS, contenders, hooks, routing_share, sync_errors, watched_program
from record import RESULTS, call_seconds, number_table, save, summary
from rich.console import Console
from rich.table import Table

import reroute_fx
from reroute_fx._compat import settle_cpu_math
from reroute_fx.benchmarking.contender import (
    Contender,
    TowerFeatures,
    alternate,
    time_decoder,
    time_first_token,
    time_generate,
)
from reroute_fx.benchmarking.expected import theory_of, weight_bytes
from reroute_fx.benchmarking.machine import peak_bytes
from reroute_fx.benchmarking.workload import Workload, free_bytes, needed_bytes

SECTIONS = ("checks", "rates", "kernels", "attention", "models", "artifacts")
STEPS, NEW_TOKENS, ATTENTION_BATCH = 16, 64, 8
COMPILE_SECONDS = {"torch.compile": 180}
"""It unrolls the layers, and compiles them again for generate; what was measured before must not be lost to it."""
SECONDS = {"checks": 40, "kernels": 60, "attention": 20, "models": 90, "artifacts": 150}
"""A step of a section is begun only if so many are left."""
console = Console(width=150)


@dataclass(frozen=True)
class Step:
    """Something to check or to measure.

    Attributes:
        name: its section first.
        run: does it.
    """

    name: str
    run: Callable[[], None]

    @property
    def seconds(self) -> int:
        return SECONDS[self.name.split()[0]]


class Run:
    """What was measured so far, and the time that is left.

    Args:
        path: of the JSON; None to keep what was measured in memory.
        seconds: after which no new step is begun.
        clock: seconds that have passed since some time.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        tiny: bool,
        path: Path | None,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.device, self.dtype, self.tiny, self.path = device, dtype, tiny, path
        self.clock, self.end = clock, clock() + seconds
        self.record: dict[str, Any] = {"dtype": str(dtype), "errors": [], "steps": [], "left_out": []}

    def keep(self, section: str, name: str, result: Any) -> None:
        self.record.setdefault(section, {})[name] = result
        if self.path:
            save(self.path, self.record)

    def fail(self, where: str, error: Exception) -> None:
        console.print(f"[red]{where}: {type(error).__name__}: {str(error)[:2000]}", highlight=False)
        self.record["errors"].append(
            {"where": where, "error": f"{type(error).__name__}: {str(error)[:2000]}"}
        )

    def take(self, steps: list[Step]) -> None:
        """Run those that there is time for, in order; a failure must not cost the others."""
        for step in steps:
            if self.has_time(step.name, 0 if self.tiny else step.seconds):
                self.record["steps"].append(step.name)
                try:
                    step.run()
                except Exception as error:
                    self.fail(step.name, error)

    def has_time(self, name: str, needs: float = 0) -> bool:
        """Whether a step that takes `needs` seconds can begin; if not, it is noted as left out."""
        left = self.end - self.clock()
        if needs < left:
            return True
        self.record["left_out"].append({"step": name, "why": f"{left:.0f} s left, {needs:.0f} needed"})
        return False

    def has_room(self, name: str, needs: int) -> bool:
        """Whether as many bytes are free on the device; if not, it is noted as left out."""
        free = free_bytes(self.device)
        if free is None or needs < free:
            return True
        self.record["left_out"].append({"step": name, "why": f"{free} bytes free, {needs} needed"})
        return False


def section_checks(run: Run) -> None:
    found = run_checks(run.device, rounds=2 if run.tiny else 60)
    run.keep("checks", "kernels", found)
    console.print(f"kernels agree with their references: {found['calls']}")
    run.keep("checks", "golden", check_golden(run.device, tiny=run.tiny))
    console.print(f"golden vectors hold: {run.record['checks']['golden']}")


def section_kernels(run: Run, rates: Rates) -> None:
    for shape in kernel_shapes(run.tiny):
        name = f"{shape.name}, batch {shape.batch}, {shape.visual} + {shape.text}"
        if run.has_time(f"kernels {name}"):
            rows = measure_kernels(shape, run.device, run.dtype, rates)
            run.keep("kernels", name, rows)
            console.print(_kernel_table(name, rows))


def section_attention(run: Run) -> None:
    for shape in (shape for shape in kernel_shapes(run.tiny) if shape.batch <= ATTENTION_BATCH):
        name = f"{shape.name}, batch {shape.batch}, {shape.visual} + {shape.text}"
        if run.has_time(f"attention {name}"):
            rows = measure_attention(shape, run.device, run.dtype)
            run.keep("attention", name, rows)
            console.print(_attention_table(name, rows))


class Models:
    """Section ``models``: one model at a time, its contenders kept for its prompts of one batch size."""

    def __init__(self, run: Run, rates: Rates, backend: str) -> None:
        self.run, self.rates, self.backend = run, rates, backend
        self.name, self.model, self.made = "", None, dict[str, Any]()

    def measure(self, name: str, batch: int) -> None:
        """Compare on all prompts of a batch size."""
        run, setting = self.run, SETTINGS[name]
        self._release(name)
        if self.model is None:
            self.name, self.model = name, setting.build(run.device, run.dtype, run.tiny)
        for visual, inputs in setting.prompts(self.model, batch, run.tiny):
            title = f"{name}, batch {batch}, {visual} visual tokens"
            if run.has_time(f"models {title}"):
                rows = measure_prompt(run, self.model, self.made, inputs, visual, self.rates, self.backend)
                run.keep("models", title, rows)
                console.print(_model_table(title, rows))

    def _release(self, name: str) -> None:
        """Caches and graphs of another batch size, and another model with all that was made of it."""
        # It has neither, and takes minutes to make.
        self.made = {kept: self.made[kept] for kept in COMPILE_SECONDS if kept in self.made}
        if name != self.name:
            self.model, self.made = None, {}
        gc.collect()
        if self.run.device.type == "cuda":
            torch.cuda.empty_cache()


def section_artifacts(run: Run) -> None:
    for name in MODELS[:1] if run.tiny else MODELS:
        if run.has_time(f"artifacts {name}", needs=0 if run.tiny else SECONDS["artifacts"]):
            asked = subject(name, run.device, run.tiny)
            run.keep("artifacts", name, check_artifact(asked, run.device, run.tiny))
            run.keep("tensorrt", name, check_engines(asked, run.device))
            console.print(f"{name}: {run.record['artifacts'][name]} {run.record['tensorrt'][name]}")


@torch.no_grad()
def measure_prompt(
    run: Run,
    model: Any,
    made: dict[str, Any],
    inputs: dict[str, torch.Tensor],
    visual: int,
    rates: Rates,
    backend: str,
) -> dict[str, Any]:
    """Times of all contenders on one batch. `made` keeps the compiled models for the next."""
    batch, columns = inputs["input_ids"].shape
    work = Workload(inputs, (visual,) * batch, (columns - visual,) * batch, STEPS)
    answers = Workload(inputs, work.visual_tokens, work.text_tokens, 4 if run.tiny else NEW_TOKENS)
    features, token = TowerFeatures(), inputs["input_ids"][:, -1:]
    with features.recorded(model):
        Contender("eager", model, work, token, features).prefill()
    ready, rows = [], {}
    # That of one contender, what its graphs hold included.
    room = needed_bytes(model, reroute_fx.inspect(model, tier=TIERS[0]), answers)
    for name, make in (hooks(model, inputs) | contenders(model, backend)).items():
        needs = 0 if name in made else COMPILE_SECONDS.get(name, 0)
        title = f"{name}, batch {batch}, {visual} visual tokens"
        if not (run.has_time(title, needs) and run.has_room(title, room)):
            continue
        try:
            if name.startswith("hooks") or name not in made:
                made[name] = make()
            pair = [Contender(name, made[name], asked, token, features) for asked in (work, answers)]
            rows[name] = _warm_up(*pair, run.device) | _theory(made[name], model, work, rates)
            ready.append(pair)
        except Exception as error:  # one contender's failure must not cost the others
            run.fail(title, error)
    steps, wholes = ([pair[i] for pair in ready] for i in range(2))
    seconds = alternate(steps, (time_first_token, time_decoder), range(_rounds(steps, run.tiny)))
    generated = alternate(wholes, (time_generate,), range(1 if run.tiny else 3))
    for name in seconds:
        for measure, samples in {**seconds[name], **generated[name]}.items():
            flat = [second for one in samples for second in one]
            rows[name][measure] = {**summary(flat), "seconds": flat}
    return rows


def _warm_up(contender: Contender, whole: Contender, device: torch.device) -> dict[str, Any]:
    """Everything is called as often as it takes until it is compiled and recorded; what is measured once."""
    first = call_seconds(lambda: time_decoder(contender))
    for _ in range(2):
        time_decoder(contender)  # graphs are recorded at the third call of a kind
    whole.generate()
    return {
        "first_call_s": first,
        "peak_bytes": peak_bytes(contender.prefill, device),
        "waits": _waits(contender, device),
        "routing_share": routing_share(contender),
    }


def _rounds(ready: list[Contender], tiny: bool) -> int:
    """As many as fit into 25 seconds, 3 to 20."""
    if tiny:
        return 1
    start = time.perf_counter()
    alternate(ready, (time_first_token, time_decoder), range(1))
    return int(min(20, max(3, 25 / (time.perf_counter() - start))))


def _theory(contender: Any, model: Any, work: Workload, rates: Rates) -> dict[str, float]:
    """Least seconds of the decoder's prefill and of a step; for contenders that say what they route."""
    if not hasattr(contender, "report"):
        return {}
    theory = theory_of(model, contender.report, work)
    weights = weight_bytes(model)
    compute = theory.prefill_flops / rates.matrix_flops
    return {
        "prefill_floor_ms": 1e3 * max(compute, weights / rates.copy_bytes),
        "step_floor_ms": 1e3 * theory.step_bytes / rates.copy_bytes,
        "theoretical_speedup": theory.prefill_speedup,
    }


def _waits(contender: Contender, device: torch.device) -> dict[str, str] | None:
    """What made the host wait for the device in the routed program and in a step; None if neither is routed."""
    if not hasattr(contender.model, "report"):
        return None
    found = {}
    with watched_program(contender.model, device):
        try:
            cache = contender.prefill().past_key_values
        except RuntimeError as error:
            found["prefill"] = str(error)[:300]
    if not found:
        contender.make_room(cache)
        calls = [contender.step_inputs(index) for index in range(3)]
        contender.step(cache, calls[0])  # allocates the room
        try:
            with sync_errors(device):
                for given in calls[1:]:
                    contender.step(cache, given)
        except RuntimeError as error:
            found["step"] = str(error)[:300]
    return found


def _kernel_table(title: str, rows: dict[str, Any]) -> Table:
    headings = ("us", "us by Inductor", "us launched", "us eager", "MiB", "of copy bandwidth")
    table = number_table("", *headings, title=title)
    kinds = ("microseconds", "inductor_microseconds", "launched_microseconds", "eager_microseconds")
    for name, row in rows.items():
        times = [f"{row[kind]:.1f}" if kind in row else "" for kind in kinds]
        table.add_row(name, *times, f"{row['bytes'] / 2**20:.2f}", f"{row['share_of_copy_bandwidth']:.2f}")
    return table


def _attention_table(title: str, rows: dict[str, Any]) -> Table:
    table = number_table("", "kernel", "us", "us by default", "us, new", "us by default, new", title=title)
    for name, row in rows.items():
        cells = [f"{row[choice]['microseconds']:.1f}" for choice in CHOICES]
        cells += [f"{max(row[choice]['new_lengths_microseconds']):.0f}" for choice in CHOICES]
        table.add_row(name, ", ".join(row["kernel"]), *cells)
    return table


def _model_table(title: str, rows: dict[str, Any]) -> Table:
    measures = ("first_token", "first_token_without_tower", "decode_step", "generate")
    headings = (
        "first token",
        "without tower",
        "step",
        "answer",
        "/ floor",
        "theory",
        "routing %",
        "GiB",
        "first s",
    )
    table = Table("p50 / p99 ms", *headings, "waits", title=title)
    for name, row in rows.items():
        cells = [f"{row[m]['p50_ms']:.2f} / {row[m]['p99_ms']:.2f}" for m in measures]
        floor = row.get("prefill_floor_ms")
        cells.append(f"{row['first_token_without_tower']['p50_ms'] / floor:.2f}" if floor else "")
        cells.append(f"{row['theoretical_speedup']:.2f}" if floor else "")
        share = row["routing_share"]
        cells.append("" if share is None else f"{100 * share:.1f}")
        cells.append(f"{(row['peak_bytes'] or 0) / 2**30:.2f}")
        waits = "" if row["waits"] is None else ", ".join(row["waits"]) or "none"
        table.add_row(name, *cells, f"{row['first_call_s']:.1f}", waits)
    return table


def in_order(
    run: Run, rates: Rates, sections: list[str], models: list[str], batches: list[int], backend: str
) -> list[Step]:
    """Steps of the sections that are wanted, what matters most first."""
    compared = Models(run, rates, backend)
    first, *others = [
        [Step(f"models {name}, batch {batch}", partial(compared.measure, name, batch)) for batch in batches]
        for name in models
    ]
    steps = [
        Step("checks", lambda: section_checks(run)),
        *first,
        Step("kernels", lambda: section_kernels(run, rates)),
        Step("attention", lambda: section_attention(run)),
        *(step for of_model in others for step in of_model),
        Step("artifacts", lambda: section_artifacts(run)),
    ]
    return [step for step in steps if step.name.split()[0] in sections]


def main(
    sections: Annotated[str, typer.Option(help=",".join(SECTIONS))] = ",".join(SECTIONS),
    models: Annotated[str, typer.Option(help=",".join(SETTINGS))] = ",".join(SETTINGS),
    batch_size: Annotated[
        str, typer.Option(metavar="N,...", help="rows of a call, one after the other")
    ] = "8,1,32",
    backend: Annotated[str, typer.Option(help="inductor or eager")] = "inductor",
    seconds: Annotated[float, typer.Option(help="begin nothing new after this time")] = 540,
    output_json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="for what was measured",
            show_default="benchmarks/results/gpu.json if not dry",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="tiny sizes on CPU")] = False,
) -> None:
    """Check and measure, and write what was measured."""
    wanted = sections.split(",")
    unknown = [s for s in wanted if s not in SECTIONS] + [m for m in models.split(",") if m not in SETTINGS]
    if unknown:
        raise typer.BadParameter(f"unknown {unknown}; expected of {SECTIONS} and {tuple(SETTINGS)}")
    if not dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no GPU; run where one is, or with --dry-run")
    device = torch.device("cpu") if dry_run else torch.device("cuda", 0)
    settle_cpu_math()
    if output_json is None and not dry_run:
        output_json = RESULTS / "gpu.json"
    run = Run(device, torch.float32 if dry_run else torch.bfloat16, dry_run, output_json, seconds)
    rates = measure_rates(device, run.dtype, dry_run)
    run.keep("rates", "copy_bytes_per_s", rates.copy_bytes)
    run.keep("rates", "matrix_flops_per_s", rates.matrix_flops)
    console.print(f"copy {rates.copy_bytes / 1e9:.0f} GB/s, matrix {rates.matrix_flops / 1e12:.1f} TFLOP/s")
    sizes = [2] if dry_run else [int(size) for size in batch_size.split(",")]
    run.take(in_order(run, rates, wanted, models.split(","), sizes, backend))
    run.keep("run", "finished", True)
    console.print(json.dumps({"errors": len(run.record["errors"]), "left out": run.record["left_out"]}))
    if run.record["errors"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
