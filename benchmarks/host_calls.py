"""What the host does for a prefill and for a token: copies, reads, and calls around and inside the programs.

python benchmarks/host_calls.py ENTRY [--output-json FILE]

Writes the entry, such as before or after, of results/host_calls.json. Counted on CPU, where the same code asks for
the same copies: on a GPU each is a launch or a wait. LLaVA with random weights, 32 layers, tier 128, 576 visual tokens.
Time inside the programs is Inductor's, on so few tokens and so small a width that the host's work is most of it.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from models import build, llava_prompts
from record import RESULTS, OutputJson, number_table, save
from rich.console import Console
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import reroute_fx
from reroute_fx.lowering import Executable, lower

WIDTH, LAYERS, TIER, TEXT = 128, 32, 128, 40
SMALL_WIDTH, SMALL_IMAGE, SMALL_TEXT = 64, 56, 8
ROUNDS = 20
FREE = (
    "view",
    "slice",
    "select",
    "expand",
    "unsqueeze",
    "squeeze",
    "transpose",
    "permute",
    "detach",
    "alias",
    "empty",
)
"""Operators that launch nothing, by the start of their names."""


class Asked(TorchFunctionMode):
    """Counts what the project's own code asks for: copies to a device, and reads of what lies on one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_ours = "reroute_fx" in sys._getframe(1).f_globals.get("__name__", "")
        to_device = func is torch.Tensor.to and any(
            isinstance(x, torch.device) for x in (*args, *kwargs.values())
        )
        self.counts["copies to the device"] += is_ours and to_device
        self.counts["copies to the host"] += is_ours and func is torch.Tensor.cpu
        return func(*args, **kwargs)


class Operators(TorchDispatchMode):
    """Counts operators around the programs, on tensors of the host too, less those that launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.is_inside = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not self.is_inside and not func.__name__.lstrip("_").startswith(FREE)
        return func(*args, **(kwargs or {}))


@contextmanager
def around_programs(enter: Callable[[], None], leave: Callable[[], None]) -> Iterator[None]:
    """Call `enter` and `leave` around each run of a program."""
    run = Executable.__call__

    def watched(self: Executable, **inputs: torch.Tensor) -> Any:
        enter()
        try:
            return run(self, **inputs)
        finally:
            leave()

    Executable.__call__ = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        Executable.__call__ = run  # type: ignore[method-assign]


def counts(run: Callable[[], Any]) -> dict[str, int]:
    """What one call asks for."""
    asked, operators = Asked(), Operators()

    def inside(value: bool) -> Callable[[], None]:
        return lambda: setattr(operators, "is_inside", value)

    with around_programs(inside(True), inside(False)), operators, asked:
        run()
    return {**asked.counts, "operators around the programs": operators.count}


def microseconds(run: Callable[[], Any]) -> float:
    """Least processor time of a call outside of the programs."""
    marks: list[float] = []
    with around_programs(lambda: marks.append(time.thread_time()), lambda: marks.append(time.thread_time())):
        samples = []
        for _ in range(ROUNDS):
            marks.clear()
            start = time.thread_time()
            run()
            whole = time.thread_time() - start
            samples.append(whole - sum(marks[1::2]) + sum(marks[::2]))
    return min(samples) * 1e6


def outer_calls(routed: Any) -> dict[str, dict[str, int]]:
    """What each program calls on the Inductor backend, and how often it checks sizes; nothing is compiled for it."""
    found = {}
    for name in ("prefill", "continuation"):
        program = lower(routed.programs[name].program)
        graph = program.__dict__["_module"].graph
        names = [node.target.__name__ for node in graph.nodes if node.op == "call_function"]
        # In versions that don't choose, every compiled function checks the sizes of its call.
        checked = names.count("choose") or program.regions
        chosen = sum(node.op == "call_method" for node in graph.nodes)
        regions = sum(name.startswith("region") for name in names)
        found[name] = {"functions": chosen + regions, "checks of sizes": checked}
    return found


def inside() -> dict[str, float]:
    """Least processor microseconds of each program on the Inductor backend, where arithmetic is next to none."""
    model = build(SMALL_WIDTH, LAYERS, SMALL_IMAGE)
    model.generation_config.pad_token_id = 0
    routed = reroute_fx.compile(model, tier=TIER)
    given: dict[str, Any] = {}
    run = Executable.__call__

    def noted(self: Executable, **inputs: torch.Tensor) -> Any:
        given[self.name] = self, inputs
        return run(self, **inputs)

    Executable.__call__ = noted  # type: ignore[method-assign]
    try:
        output = routed(**llava_prompts(model, 1, 1, SMALL_TEXT))
        routed(input_ids=torch.tensor([[5]]), past_key_values=output.past_key_values)
    finally:
        Executable.__call__ = run  # type: ignore[method-assign]
    found = {}
    for name, (program, inputs) in given.items():
        samples = []
        for _ in range(10 * ROUNDS):
            start = time.thread_time()
            program(**inputs)
            samples.append(time.thread_time() - start)
        found[name] = round(min(samples) * 1e6)
    return found


def calls(routed: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """What is counted, by name."""
    padded = {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()}
    padded["attention_mask"][0, 0] = 0
    cache = routed(**inputs, past_key_values=reroute_fx.RoutedCache(max_length=2048)).past_key_values
    token = torch.tensor([[5]])
    found = {
        "prefill": lambda: routed(**inputs),
        "prefill, padded batch": lambda: routed(**padded),
        "generate, first token": lambda: routed.generate(**inputs, max_new_tokens=1, min_new_tokens=1),
        "step": lambda: routed(input_ids=token, past_key_values=cache),
    }
    if hasattr(reroute_fx, "SlotPool"):
        pool = reroute_fx.SlotPool(routed, rows=8, capacity=1024)
        output, slot = routed(**inputs), pool.claim()
        pool.write(slot, output)
        pool.write(pool.claim(7), output, rows=[0] * 7)
        tokens, active = torch.full((8,), 5), [True] * 8
        found |= {
            "slot step, 8 rows": lambda: pool.step(tokens, active),
            "writing into a slot": lambda: pool.write(slot, output),
        }
    return found


@torch.no_grad()
def main(
    entry: Annotated[str, typer.Argument(help="its name in the record")],
    output_json: OutputJson = RESULTS / "host_calls.json",
) -> None:
    """Count, print a table and write the entry."""
    torch.set_num_threads(1)
    model = build(WIDTH, LAYERS)
    model.generation_config.pad_token_id = 0
    routed = reroute_fx.compile(model, tier=TIER, backend="eager")
    inputs = llava_prompts(model, 1, 1, TEXT)
    measured = {}
    for name, run in calls(routed, inputs).items():
        run()
        measured[name] = {
            **counts(run),
            "processor microseconds around the programs": round(microseconds(run)),
        }
    record = json.loads(output_json.read_text()) if output_json.exists() else {}
    record["setting"] = {"width": WIDTH, "layers": LAYERS, "tier": TIER, "text": TEXT}
    programs = {
        "outer calls on inductor": outer_calls(routed),
        "processor microseconds of a program": inside(),
    }
    record[entry] = {"calls": measured, **programs}
    record.pop("environment", None)
    path = save(output_json, record)
    headings = list(next(iter(measured.values())))
    table = number_table("call", *headings, title=entry)
    for name, row in measured.items():
        table.add_row(name, *(str(row[heading]) for heading in headings))
    Console().print(table, programs, f"written to {path}")


if __name__ == "__main__":
    typer.run(main)
