"""The front door: `benchmark` a routed model against the model it was made from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from rich.console import Console
from rich.progress import track

from ..api import compile
from ..methods import UNROUTED
from .contender import MEASUREMENTS, Contender, TowerFeatures, alternate, timed
from .expected import theory_of
from .machine import environment, peak_bytes
from .parity import Computed, Parity, check_parity
from .result import BenchmarkResult, ContenderResult, Timing
from .workload import Workload, check_count, check_memory, check_models, read_workload

Step = TypeVar("Step")
_baselines: "WeakKeyDictionary[torch.nn.Module, Any]" = WeakKeyDictionary()
"""What was compiled without routing for a routed model: the next batch finds it compiled."""


@dataclass(frozen=True)
class _FirstCalls:
    seconds: dict[str, float]
    compilations: dict[str, int]
    kv_bytes: int
    computed: Computed


def benchmark(
    model: torch.nn.Module,
    routed: Any,
    inputs: Mapping[str, Any],
    *,
    new_tokens: int = 64,
    rounds: int = 10,
    warmup: int = 1,
    progress: bool = False,
) -> BenchmarkResult:
    """Time a model in eager mode, compiled without routing, and routed, alternating in one run.

    ``"eager"`` is `model` as it is, ``"compiled"`` is ``reroute_fx.compile(model, method="none")`` on the backend of
    `routed`: the same compiler and attention kernels. First calls, in which the compiler works, are timed apart. Before
    anything else is timed the routed model has to agree with its own graph run on the ``"eager"`` backend, see
    `Parity`. Measured are:

    - ``first_token``: a prompt in, logits and cache out, with the vision tower;
    - ``first_token_without_tower``: the same on features that the tower computed before;
    - ``decode_step``: each of `new_tokens` single tokens on that cache, in which there is room for them;
    - ``generate``: the whole call, greedy, with exactly `new_tokens` new tokens.

    Args:
        model: the original model, on the CPU or a CUDA device.
        routed: what `reroute_fx.compile` made of it.
        inputs: what the processor returned, on the model's device, with an image or a video in at least one row;
            rows padded on the left.
        new_tokens: tokens to generate for each row.
        rounds: how often everything is measured. Below 100 the 99th percentile is close to the largest sample.
        warmup: rounds that run before these, after the first calls, and are not measured. With none, the first
            measured round has what else is called for the first time, as `generate` is.
        progress: show progress bars on stderr.

    Raises:
        ConfigError, InputError, UnsupportedModelError: before anything runs.
        ParityError: before anything but first calls is timed.
    """
    work = check_benchmark(model, routed, inputs, new_tokens=new_tokens, rounds=rounds, warmup=warmup)
    device = work.inputs["input_ids"].device
    with torch.no_grad():
        contenders = _contenders(model, routed, work)
        first = {}
        for contender in _shown(contenders, "compiling", progress):
            first[contender.name] = _first_calls(contender)
        parity = _check(model, routed, work, {name: calls.computed for name, calls in first.items()})
        alternate(contenders, MEASUREMENTS, _shown(range(warmup), "warming up", progress))
        seconds = alternate(contenders, MEASUREMENTS, _shown(range(rounds), "measuring", progress))
        peaks = {c.name: peak_bytes(c.generate, device) for c in contenders}
    results = {}
    for name, calls in first.items():
        timings = {measure: Timing(tuple(map(tuple, samples))) for measure, samples in seconds[name].items()}
        results[name] = ContenderResult(
            timings, calls.seconds, calls.compilations, calls.kv_bytes, peaks[name]
        )
    return BenchmarkResult(
        model=type(model).__name__,
        config=routed.routing_config,
        backend=routed.report.backend,
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        visual_tokens=work.visual_tokens,
        text_tokens=work.text_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
        warmup=warmup,
        contenders=results,
        theory=theory_of(model, routed.report, work),
        parity=parity,
        environment=environment(device),
    )


def check_benchmark(
    model: torch.nn.Module,
    routed: Any,
    inputs: Mapping[str, Any],
    *,
    new_tokens: int,
    rounds: int,
    warmup: int = 1,
) -> Workload:
    """What `benchmark` would measure, after all that it refuses before anything runs."""
    check_models(model, routed)
    check_count("new_tokens", new_tokens)
    check_count("rounds", rounds)
    check_count("warmup", warmup, least=0)
    work = read_workload(routed, inputs, new_tokens)
    check_memory(model, routed.report, work)
    return work


def _shown(steps: Sequence[Step], what: str, progress: bool) -> Iterator[Step]:
    """The steps, with a progress bar on stderr if one is wanted."""
    screen = Console(stderr=True)
    return iter(track(steps, what, console=screen, disable=not progress, transient=True))


def _contenders(model: Any, routed: Any, work: Workload) -> list[Contender]:
    if routed not in _baselines:
        _baselines[routed] = compile(model, method=UNROUTED, backend=routed.report.backend)
    models = {"eager": model, "compiled": _baselines[routed], "routed": routed}
    features, token = TowerFeatures(), work.inputs["input_ids"][:, -1:]
    with features.recorded(model):
        Contender("eager", model, work, token, features).prefill()
    return [Contender(name, each, work, token, features) for name, each in models.items()]


def _first_calls(contender: Contender) -> _FirstCalls:
    """Time what compiles, and keep what was computed."""
    device, before = contender.model.device, _compilations(contender.model)
    output, prefill = timed(contender.prefill, device)
    cache = output.past_key_values
    kv_bytes = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    contender.make_room(cache)
    given = contender.step_inputs(0)
    following, step = timed(lambda: contender.step(cache, given), device)
    logits = torch.stack([output.logits[:, -1], following.logits[:, -1]])
    compilations = {name: count - before[name] for name, count in _compilations(contender.model).items()}
    routing = getattr(output, "routing", None)
    return _FirstCalls(
        {"prefill": prefill, "decode_step": step}, compilations, kv_bytes, Computed(logits, routing)
    )


def _compilations(model: Any) -> dict[str, int]:
    return dict(model.report.compilations) if hasattr(model, "report") else {}


def _check(model: Any, routed: Any, work: Workload, computed: dict[str, Computed]) -> Parity:
    twin = compile(model, config=routed.routing_config, backend="eager")
    same = Contender("eager twin", twin, work, work.inputs["input_ids"][:, -1:], TowerFeatures())
    return check_parity(
        computed["eager"],
        computed["compiled"],
        computed["routed"],
        _first_calls(same).computed,
        dtype=model.dtype,
        layers=routed.report.num_layers,
    )
