"""GuideLLM against servers of the same model, unrouted and routed: how long requests take, and how many there can be.

    pip install -e '.[serve,load,bench]'
    python benchmarks/serving_load.py [--model demo] [--output-json serving_load_demo.json]

``demo`` is the model that ships, ``random`` one of 16 layers, width 768, with random weights and 576 visual tokens.
Every request has a picture of its own and an answer of a fixed length, streamed. ``closed`` are clients that each ask
again when they have an answer, in rounds in which both servers take turns; ``random`` are arrivals at random (Poisson)
at shares of the rate that the unrouted server reached with the most clients. ``goodput`` are requests a second that
keep to limits: of the time to the first token and of the mean time between tokens, at a multiple of what the unrouted
server takes for one client at the median. The JSON has every request's times in milliseconds, the picture medians and
99th percentiles. ``time between tokens`` is GuideLLM's, a mean over an answer: single ones are in serving_engine.py.
``theory`` is the unrouted model's FLOPs over the routed one's, vision tower and all: of a prompt with its first token,
and of a request.

One core is left to the client, HTTP and the workers; nothing else may run.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.figure import Figure
from models import save_with_processor
from record import RESULTS, number_table, save
from rich.console import Console
from served_process import ServedProcess
from torch.utils.flop_counter import FlopCounterMode

from reroute_fx._compat import package_version
from reroute_fx.common.optional_libraries import optional_library
from reroute_fx.loading.prompts import encode
from reroute_fx.loading.sample_picture import picture
from reroute_fx.serving import start

CONTENDERS: dict[str, dict[str, str]] = {"unrouted": {"method": "none"}, "routed": {"tier": "128"}}
ROWS, TOKENS, SIZE = 8, 32, 336
CLIENTS = {"demo": {32: [1, 2, 4, 8], 96: [16, 32]}, "random": {12: [1, 8], 48: [32]}}
"""By the requests that are sent in all by each number of them. Both servers do the same work, however long it takes."""
RATES = {"demo": {48: [0.3, 0.6, 0.9]}, "random": {12: [0.6]}}
"""Shares of the unrouted server's most, by requests."""
ROUNDS = {"demo": 3, "random": 1}
LIMIT = 3.0
"""Times what the unrouted server takes for one client."""
WIDTH, LAYERS = 768, 16
PERCENTILES = (50, 90, 99)
MEASURES = {
    "time_to_first_token_ms": "time to first token, ms",
    "inter_token_latency_ms": "time between tokens, ms",
    "request_latency": "time of a request, s",
}


class Guide:
    """Runs GuideLLM against a server."""

    def __init__(self, server: ServedProcess, folder: Path) -> None:
        self.server, self.folder = server, folder

    def run(self, profile: dict[str, Any], requests: int) -> list[dict[str, Any]]:
        """A record for each number of clients, or rate, of a profile."""
        path = self.folder / "guide.json"
        backend = {
            "kind": "openai_http",
            "target": f"http://127.0.0.1:{self.server.port}",
            "model": self.server.name,
            # GuideLLM counts pieces of text, and the model that ships goes on with special tokens, which have none.
            "extras": {"body": {"skip_special_tokens": False}},
        }
        data = {"kind": "synthetic_image", "width": SIZE, "height": SIZE, "output_tokens": TOKENS}
        options: dict[str, Any] = {
            "backend": backend,
            "profile": profile,
            "constraint": {"kind": "max_requests", "count": requests},
            "data": data,
            "metrics": {"kind": "generative", "sample_size": 0},
            "output": {"kind": "json", "path": str(path)},
        }
        command = [sys.executable, "-m", "guidellm", "run", "--disable-console"]
        for name, value in options.items():
            command += [f"--{name}", json.dumps(value)]
        # One process that sends requests: there are as many cores as the server leaves.
        variables = {**os.environ, "GUIDELLM__MAX_WORKER_PROCESSES": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=variables)
        return [_record(benchmark) for benchmark in json.loads(path.read_text())["benchmarks"]]


def _record(benchmark: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one of GuideLLM's benchmarks."""
    strategy = benchmark["config"]["strategy"]
    done = benchmark["requests"]["successful"]
    if not done:
        raise RuntimeError(f"no request was answered ({strategy}); expected all")
    return {
        "clients": strategy.get("streams"),
        "rate": strategy.get("rate"),
        "failed": sum(len(benchmark["requests"][name] or ()) for name in ("errored", "incomplete")),
        "requests_per_second": benchmark["metrics"]["requests_per_second"]["successful"]["mean"],
        "samples": {name: [request[name] for request in done] for name in MEASURES},
    }


def _pool(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The records of several rounds as one for each number of clients, or rate."""
    return [_pooled(records) for records in zip(*rounds, strict=True)]


def _pooled(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    samples = {name: [value for record in records for value in record["samples"][name]] for name in MEASURES}
    rates = [record["requests_per_second"] for record in records]
    return {
        **records[0],
        "failed": sum(record["failed"] for record in records),
        # Each round has as many requests.
        "requests_per_second": len(rates) / sum(1 / rate for rate in rates),
        "rounds": rates,
        "samples": samples,
        **{
            name: {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
            for name, values in samples.items()
        },
    }


def measure(name: str, model: str, folder: Path) -> dict[str, Any]:
    """Both contenders at the same numbers of clients, then at the same rates."""
    threads = str(max(1, (os.cpu_count() or 1) - 1))
    servers = {
        contender: ServedProcess(
            model,
            *(part for option, value in routing.items() for part in (f"--{option}", value)),
            *("--max-batch-size", str(ROWS), "--dtype", "float32"),
            OMP_NUM_THREADS=threads,
        )
        for contender, routing in CONTENDERS.items()
    }
    found: dict[str, Any] = {"closed": {}, "random": {}}
    try:
        for server in servers.values():
            server.wait()
        guides = {contender: Guide(server, folder) for contender, server in servers.items()}
        rounds: dict[str, list[list[dict[str, Any]]]] = {contender: [] for contender in guides}
        for _ in range(ROUNDS[name]):
            for contender, guide in guides.items():
                rounds[contender].append(
                    [
                        record
                        for requests, clients in CLIENTS[name].items()
                        for record in guide.run({"kind": "concurrent", "streams": clients}, requests)
                    ]
                )
        found["closed"] = {contender: _pool(records) for contender, records in rounds.items()}
        most = found["closed"]["unrouted"][-1]["requests_per_second"]
        for contender, guide in guides.items():
            found["random"][contender] = [
                _pooled([record])
                for requests, shares in RATES[name].items()
                for record in guide.run(
                    {"kind": "poisson", "rate": [share * most for share in shares]}, requests
                )
            ]
    finally:
        for server in servers.values():
            server.stop()
    return {"limits": _add_goodput(found), "threads": int(threads), **found}


def _add_goodput(found: dict[str, Any]) -> dict[str, float]:
    """Requests a second of each record that keep to the limits, which come from the unrouted server's first one."""
    alone = found["closed"]["unrouted"][0]
    limits = {name: LIMIT * alone[name]["p50"] for name in [*MEASURES][:2]}
    for contenders in found.values():
        for record in (record for records in contenders.values() for record in records):
            times = zip(*(record["samples"][name] for name in limits), strict=True)
            kept = [
                all(t <= limit for t, limit in zip(of_one, limits.values(), strict=True)) for of_one in times
            ]
            record["goodput"] = record["requests_per_second"] * sum(kept) / len(kept)
    return limits


def theory(model: str) -> dict[str, float]:
    """FLOPs of the unrouted model over those of the routed one, of a first token and of a whole answer."""
    counted: dict[str, list[int]] = {"first token": [], "request": []}
    for routing in CONTENDERS.values():
        routings = start.read_routings(model, None, routing.get("tier"), None, routing)
        named = start.compile_tiers(model, routings, backend="eager", device="cpu", dtype="float32")
        (routed,) = named.models.values()
        inputs = encode(named.processor, routed, [picture(0, (SIZE, SIZE))], [""])
        for what, tokens in (("first token", 1), ("request", TOKENS)):
            with FlopCounterMode(display=False) as counter:
                routed.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
            counted[what].append(counter.get_total_flops())
    return {what: unrouted / routed for what, (unrouted, routed) in counted.items()}


def draw(name: str, result: dict[str, Any], path: Path) -> None:
    """Request rate, goodput and both times over the number of clients."""
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    (rate, goodput), times = figure.subplots(2, 2)
    for colour, (contender, records) in zip(("C0", "C1"), result["closed"].items(), strict=True):
        clients = [record["clients"] for record in records]
        for chart, measure in ((rate, "requests_per_second"), (goodput, "goodput")):
            chart.plot(clients, [record[measure] for record in records], "o-", color=colour, label=contender)
        for chart, measure in zip(times, MEASURES, strict=False):
            for percentile, line in (("p50", "o-"), ("p99", "o:")):
                values = [record[measure][percentile] for record in records]
                chart.plot(clients, values, line, color=colour, label=f"{contender}, {percentile}")
    unrouted = [result["theory"]["request"] * r["requests_per_second"] for r in result["closed"]["unrouted"]]
    rate.plot(clients, unrouted, "--", color="0.6", label="unrouted, times theory's ratio")
    rate.set_title("requests a second")
    first, between = (f"{limit:.0f} ms" for limit in result["limits"].values())
    goodput.set_title(f"goodput: first token in {first}, {between} between", fontsize=11)
    for chart, measure in zip(times, MEASURES, strict=False):
        chart.set_title(MEASURES[measure])
    times[0].set_yscale("log")
    times[0].yaxis.set_major_formatter("{x:g}")
    times[1].set_ylim(bottom=0)
    for chart in (rate, goodput):
        # Room for the legend.
        chart.set_ylim(0, 1.35 * max(chart.get_ylim()[1], 0.01))
    for chart in (rate, goodput, *times):
        chart.set_xscale("log", base=2)
        chart.set_xticks(clients, [str(number) for number in clients])
        chart.set_xlabel("clients at once")
        chart.legend(frameon=False)
    figure.suptitle(f"{name}: {ROWS} rows, answers of {TOKENS} tokens, {result['threads']} thread")
    figure.savefig(path)


def main(
    model: Annotated[str, typer.Option(metavar="demo|random", help="which one")] = "demo",
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="for what was measured")] = None,
) -> None:
    """Measure, and write what was measured, and a picture of it."""
    optional_library("guidellm", "load", "to send requests")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random")
        if model == "random":
            save_with_processor(path, WIDTH, LAYERS)
        served = str(path) if model == "random" else model
        result = {"theory": theory(served), **measure(model, served, Path(folder))}
    setting = {
        "model": model,
        "rows": ROWS,
        "tokens": TOKENS,
        "guidellm": package_version("guidellm"),
        **({"width": WIDTH, "layers": LAYERS} if model == "random" else {}),
    }
    path = save(output_json or RESULTS / f"serving_load_{model}.json", {"setting": setting, **result})
    draw(model, result, path.with_suffix(".png"))
    console = Console(width=140)
    for kind in ("closed", "random"):
        console.print(_table(f"{model}, {kind}", result[kind]))
    console.print(f"theory {result['theory']}, written to {path}")


def _table(title: str, contenders: dict[str, list[dict[str, Any]]]) -> Any:
    table = number_table(
        "",
        "clients or rate",
        "requests/s",
        "goodput/s",
        "first token p50, p99 ms",
        "between p50, p99 ms",
        title=title,
    )
    for contender, records in contenders.items():
        for record in records:
            times = ["{p50:.1f}, {p99:.1f}".format(**record[measure]) for measure in [*MEASURES][:2]]
            load = f"{record['clients'] or record['rate']:.3g}"
            table.add_row(
                contender,
                load,
                f"{record['requests_per_second']:.2f}",
                f"{record['goodput']:.2f}",
                *times,
            )
    return table


if __name__ == "__main__":
    typer.run(main)
