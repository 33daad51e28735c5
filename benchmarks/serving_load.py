"""GuideLLM against servers of the same model, unrouted and routed: how long requests take, and how many there can be.

    pip install -e '.[serve,load,bench]'
    python benchmarks/serving_load.py [--models demo,random] [--output-json serving_load.json]

Models are the one that ships and one of 16 layers, width 768, with random weights and 576 visual tokens. Every request
has a picture of its own and an answer of a fixed length, streamed. ``closed`` are clients that each ask again when they
have an answer, ``random`` are arrivals at random (Poisson) at shares of the rate that the unrouted server reached with
the most clients. The limits of goodput are the time to the first token and the mean time between tokens of an
answer, at a multiple of what the unrouted server takes for one client. The JSON has every request's times in
milliseconds, the picture medians and 99th percentiles. ``time between tokens`` is GuideLLM's, a mean over an answer:
single ones are in serving_engine.py.

One core is left to the client, HTTP and the workers; nothing else may run.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from models import save_with_processor
from record import RESULTS, OutputJson, number_table, save
from rich.console import Console
from served_process import ServedProcess

from reroute_fx._compat import package_version
from reroute_fx.common.optional_libraries import optional_library

CONTENDERS = {"unrouted": ("--method", "none"), "routed": ("--tier", "128")}
ROWS, TOKENS, SIZE = 8, 32, 336
CLIENTS = {"demo": [1, 2, 4, 8, 16, 32], "random": [1, 8, 32]}
SHARES = {"demo": [0.3, 0.6, 0.9], "random": [0.6]}
SECONDS = {"demo": 8, "random": 24}
"""Of each number of clients, and of each rate."""
LIMIT = 3.0
"""Times what the unrouted server takes for one client."""
WIDTH, LAYERS = 768, 16
PERCENTILES = ("p50", "p90", "p99")
MEASURES = {
    "time_to_first_token_ms": "time to first token, ms",
    "inter_token_latency_ms": "time between tokens, ms",
    "request_latency": "time of a request, s",
}


class Guide:
    """Runs GuideLLM against a server."""

    def __init__(self, server: ServedProcess, seconds: float, folder: Path) -> None:
        self.server, self.seconds, self.folder = server, seconds, folder

    def run(self, profile: dict[str, Any], limits: dict[str, float] | None) -> list[dict[str, Any]]:
        """A record for each number of clients, or rate, of a profile."""
        path = self.folder / "guide.json"
        backend = {
            "kind": "openai_http",
            "target": f"http://127.0.0.1:{self.server.port}",
            "model": self.server.name,
        }
        data = {"kind": "synthetic_image", "width": SIZE, "height": SIZE, "output_tokens": TOKENS}
        options: dict[str, Any] = {
            "backend": backend,
            "profile": profile,
            "constraint": {"kind": "max_duration", "seconds": self.seconds},
            "data": data,
            "metrics": {"kind": "generative", "sample_size": 0, "slo": limits},
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
    metrics, strategy = benchmark["metrics"], benchmark["config"]["strategy"]
    done = benchmark["requests"]["successful"]
    if not done:
        raise RuntimeError(
            f"no request was answered in time ({strategy}); expected some. Give them more seconds"
        )
    found = {
        "clients": strategy.get("streams"),
        "rate": strategy.get("rate"),
        "requests": {
            name: len(benchmark["requests"][name] or ()) for name in ("successful", "errored", "incomplete")
        },
        "requests_per_second": metrics["requests_per_second"]["successful"]["mean"],
        "goodput": (metrics["request_goodput"] or {}).get("successful", {}).get("mean"),
        "attainment": metrics["slo_attainment"],
        "samples": {name: [request[name] for request in done] for name in MEASURES},
    }
    for name in MEASURES:
        percentiles = metrics[name]["successful"]["percentiles"]
        found[name] = {percentile: percentiles[percentile] for percentile in PERCENTILES}
    return found


def measure(name: str, model: str, folder: Path) -> dict[str, Any]:
    """Both contenders at the same numbers of clients, then at the same rates."""
    threads = str(max(1, (os.cpu_count() or 1) - 1))
    servers = {
        contender: ServedProcess(
            model, *options, "--max-batch-size", str(ROWS), "--dtype", "float32", OMP_NUM_THREADS=threads
        )
        for contender, options in CONTENDERS.items()
    }
    try:
        for server in servers.values():
            server.wait()
        guides = {contender: Guide(server, SECONDS[name], folder) for contender, server in servers.items()}
        one = {"kind": "concurrent", "streams": [1]}
        (alone,) = guides["unrouted"].run(one, None)
        limits = {
            "ttft_ms": LIMIT * alone["time_to_first_token_ms"]["p50"],
            "tpot_ms": LIMIT * alone["inter_token_latency_ms"]["p50"],
        }
        closed = {"kind": "concurrent", "streams": CLIENTS[name]}
        found = {"closed": {contender: guide.run(closed, limits) for contender, guide in guides.items()}}
        most = found["closed"]["unrouted"][-1]["requests_per_second"]
        arrivals = {"kind": "poisson", "rate": [share * most for share in SHARES[name]]}
        found["random"] = {contender: guide.run(arrivals, limits) for contender, guide in guides.items()}
    finally:
        for server in servers.values():
            server.stop()
    return {"limits": limits, "threads": int(threads), **found}


def draw(results: dict[str, Any], path: Path) -> None:
    """Request rate, goodput and both times over the number of clients."""
    figure = Figure(figsize=(14, 3.8 * len(results) + 0.5), dpi=120, layout="constrained")
    charts = figure.subplots(len(results), 4, squeeze=False)
    for row, (name, result) in zip(charts, results.items(), strict=True):
        for contender, records in result["closed"].items():
            clients, colour = [record["clients"] for record in records], f"C{[*CONTENDERS].index(contender)}"
            for chart, measure in zip(row, ("requests_per_second", "goodput"), strict=False):
                chart.plot(clients, [r[measure] for r in records], "o-", color=colour, label=contender)
                chart.set_title(f"{name}: {measure.replace('_', ' ')}")
                chart.set_ylim(bottom=0)
            for chart, measure in zip(row[2:], MEASURES, strict=False):
                for percentile, line in (("p50", "o-"), ("p99", "o:")):
                    values = [record[measure][percentile] for record in records]
                    chart.plot(clients, values, line, color=colour, label=f"{contender}, {percentile}")
                chart.set_title(f"{name}: {MEASURES[measure]}")
                chart.set_yscale("log")
        for chart in row:
            chart.set_xscale("log", base=2)
            chart.set_xlabel("clients")
        row[0].legend(frameon=False)
        row[2].legend(frameon=False)
    figure.savefig(path)


def main(
    models: Annotated[str, typer.Option(metavar="demo,random", help="which ones")] = "demo,random",
    output_json: OutputJson = RESULTS / "serving_load.json",
) -> None:
    """Measure, and write what was measured, and a picture of it."""
    optional_library("guidellm", "load", "to send requests")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in models.split(","):
            model = name
            if name == "random":
                model = str(Path(folder, "random"))
                save_with_processor(Path(model), WIDTH, LAYERS)
            results[name] = measure(name, model, Path(folder))
    setting = {
        "rows": ROWS,
        "tokens": TOKENS,
        "width": WIDTH,
        "layers": LAYERS,
        "guidellm": package_version("guidellm"),
    }
    path = save(output_json, {"setting": setting, "models": results})
    draw(results, path.with_suffix(".png"))
    console = Console(width=140)
    for name, result in results.items():
        for kind in ("closed", "random"):
            console.print(_table(f"{name}, {kind}", result[kind]))
    console.print(f"written to {path}")


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
                f"{record['goodput'] or 0:.2f}",
                *times,
            )
    return table


if __name__ == "__main__":
    typer.run(main)
