"""The serving engine without HTTP: what it costs beside the model, and how long answers wait for prompts.

    python benchmarks/serving_engine.py [--num-iters 100] [--models demo,random] [--output-json serving_engine.json]

Models are the one that ships and one of 16 layers, width 768, with random weights; eight rows, tier 128.

``overhead`` is the share of a step that is spent outside the model: a step of the engine over the step of the pool in
it. ``gaps`` are seconds between two tokens of seven answers, while prompts with a picture arrive one after the other,
each with an answer of 16 tokens: once with steps between the layers of a prompt, as the engine has them, and once
without, in alternating rounds. ``alone`` are requests a second when each waits for the one before, ``eight`` when there
are always eight.
"""

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from models import save_with_processor
from record import RESULTS, NumIters, OutputJson, number_table, save, summary
from rich.console import Console

from reroute_fx._compat import settle_cpu_math
from reroute_fx.loading.prompts import encode
from reroute_fx.loading.sample_picture import picture
from reroute_fx.runtime import SlotPool
from reroute_fx.serving import start
from reroute_fx.serving.bounds import Bounds
from reroute_fx.serving.engine import Engine, Tier
from reroute_fx.serving.metrics import Metrics
from reroute_fx.serving.sampling import Sampling

ROWS, TIER, CAPACITY, TOKENS = 8, "128", 1024, 32
WIDTH, LAYERS = 768, 16
WAYS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_p": 0.95, "seed": 1},
    "log probabilities": {"temperature": 0.0, "logprobs": 5},
}


class Bench:
    """An engine that is stepped here, and the seconds of the model in it."""

    def __init__(self, name: str) -> None:
        routings = start.read_routings(name, None, TIER, None, {})
        named = start.compile_tiers(name, routings, backend="inductor", device="cpu", dtype="float32")
        model = named.models[TIER]
        pool = SlotPool(model, ROWS, CAPACITY)
        self.engine = Engine([Tier(TIER, model, pool)], named.processor.tokenizer, Bounds(), Metrics())
        self.inputs = [encode(named.processor, model, [picture(i)], ["What is that?"]) for i in range(ROWS)]
        self.model_seconds = 0.0
        step = pool.step

        def timed(*given: Any) -> Any:
            before = time.perf_counter()
            logits = step(*given)
            self.model_seconds += time.perf_counter() - before
            return logits

        pool.step = timed  # type: ignore[method-assign]

    def submit(self, number: int, tokens: int, **options: Any) -> Any:
        sampling = Sampling(tokens, ignores_end=True, **{"temperature": 0.0, **options})
        return self.engine.submit(self.inputs[number % ROWS], sampling)

    def finish(self) -> None:
        while self.engine.step():
            pass

    def overhead(self, way: str, steps: int) -> dict[str, list[float]]:
        """Seconds of steps of eight rows, and of the model in them."""
        for number in range(ROWS):
            self.submit(number, steps + ROWS + 1, **WAYS[way])
        for _ in range(ROWS):
            self.engine.step()
        whole, inner = [], []
        for _ in range(steps):
            self.model_seconds, before = 0.0, time.perf_counter()
            self.engine.step()
            whole.append(time.perf_counter() - before)
            inner.append(self.model_seconds)
        self.finish()
        return {"step": whole, "model": inner}

    def gaps(self, prompts: int, pauses: bool) -> list[float]:
        """Seconds between tokens of seven answers while prompts come."""
        engine, pause = self.engine, self.engine._pause
        growing = [self.submit(number, CAPACITY - 700) for number in range(ROWS - 1)]
        for _ in range(ROWS - 1):
            engine.step()
        if not pauses:
            engine._pause = lambda request: None  # type: ignore[method-assign]
        watch, seconds = growing[0], []
        put = watch.put

        def note(part: Any) -> None:
            seconds.append(time.perf_counter())
            put(part)

        watch.put = note
        for number in range(prompts):
            came = self.submit(number, 16)
            while not came.ended:
                engine.step()
                came.take()
                for answer in growing:
                    answer.take()
        engine._pause = pause  # type: ignore[method-assign]
        for answer in growing:
            answer.cancel()
        self.finish()
        return list(np.diff(seconds))

    def rate(self, at_once: int, requests: int) -> float:
        """Requests a second when as many are there at once."""
        before, sent, running = time.perf_counter(), 0, []
        while sent < requests or running:
            while sent < requests and len(running) < at_once:
                running.append(self.submit(sent, TOKENS))
                sent += 1
            self.engine.step()
            running = [answer for answer in running if not answer.ended]
        return requests / (time.perf_counter() - before)


def measure(bench: Bench, rounds: int) -> dict[str, Any]:
    for way in WAYS:
        bench.overhead(way, 3)
    overheads = {way: bench.overhead(way, rounds) for way in WAYS}
    gaps: dict[str, list[float]] = {"with steps between layers": [], "without": []}
    for _ in range(2):
        for name, held in gaps.items():
            held += bench.gaps(4, pauses=name != "without")
    rates = {"alone": bench.rate(1, 6), "eight": bench.rate(ROWS, 24)}
    return {
        "overhead": {way: _share(found) for way, found in overheads.items()},
        "gaps": {name: {**summary(held), "p99_over_p50": _tail(held)} for name, held in gaps.items()},
        "requests_per_second": {**rates, "ratio": rates["eight"] / rates["alone"]},
        "seconds": {"overhead": overheads, "gaps": gaps},
    }


def _share(found: dict[str, list[float]]) -> dict[str, float]:
    shares = [whole / inner - 1 for whole, inner in zip(found["step"], found["model"], strict=True)]
    return {"share": float(np.median(shares)), "step_p50_ms": 1e3 * float(np.median(found["step"]))}


def _tail(seconds: list[float]) -> float:
    return float(np.percentile(seconds, 99) / np.percentile(seconds, 50))


def main(
    num_iters: NumIters = 100,
    models: Annotated[str, typer.Option(metavar="demo,random", help="which ones")] = "demo,random",
    output_json: OutputJson = RESULTS / "serving_engine.json",
) -> None:
    """Measure, and write what was measured."""
    settle_cpu_math()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in models.split(","):
            if name == "random":
                save_with_processor(Path(folder), WIDTH, LAYERS)
            results[name] = measure(Bench(folder if name == "random" else name), num_iters)
    setting = {"rows": ROWS, "tier": TIER, "tokens": TOKENS, "width": WIDTH, "layers": LAYERS}
    path = save(output_json, {"setting": setting, "models": results})
    console = Console(width=120)
    for name, result in results.items():
        table = number_table("", "", title=name)
        for way, found in result["overhead"].items():
            table.add_row(f"overhead, {way}", f"{found['share']:.1%} of {found['step_p50_ms']:.1f} ms")
        for way, found in result["gaps"].items():
            table.add_row(
                f"between tokens, {way}",
                f"p50 {found['p50_ms']:.1f}, p99 {found['p99_ms']:.1f} ms, {found['p99_over_p50']:.2f}",
            )
        for way, found in result["requests_per_second"].items():
            table.add_row(f"requests per second, {way}", f"{found:.2f}")
        console.print(table)
    console.print(f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
