"""Command line: `reroute-fx`."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..analysis.paper_configs import PaperConfig

app = typer.Typer(
    help="Route the visual tokens of vision-language models.", no_args_is_help=True, add_completion=False
)
# Help should not wait for torch: commands import what they need, and the choices are repeated here.
ACTIONS = ("physical_delete", "compact_route", "compact_route_stagewise")
BACKENDS = ("inductor", "eager", "tensorrt")
FORMATS = ("aot", "onnx", "tensorrt")
SCHEDULES = ("exact", "paper")
_TIER = "192, 128, 64, or the share of tokens kept; 128 or what the method's authors run if left out"
_METHOD = "a name that `reroute-fx methods` lists"
_DEVICE = "cpu, cuda or cuda:1"
_console, _errors = Console(), Console(stderr=True)


@contextmanager
def _refusals() -> Iterator[None]:
    """Errors that are raised on purpose are told in one line, and end the command with exit code 1."""
    try:
        yield
    except Exception as error:
        from ..errors import RerouteError

        if not isinstance(error, RerouteError):
            raise
        message = f"{type(error).__name__}: {error}"
        _errors.print(message, style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit"),
    ] = False,
) -> None:
    """Options that are no command's."""


@app.command()
@_refusals()
def inspect(
    model: Annotated[str, typer.Argument(help="model id, folder, or config.json; weights are not needed")],
    tier: Annotated[float | None, typer.Option(help=_TIER)] = None,
    method: Annotated[str, typer.Option(help=_METHOD)] = "pdrop",
    action: Annotated[str, typer.Option(help=", ".join(ACTIONS))] = "compact_route_stagewise",
    schedule: Annotated[str, typer.Option(help=" or ".join(SCHEDULES))] = "exact",
    visual_tokens: Annotated[int, typer.Option(min=1, help="visual tokens of the prompt")] = 576,
    text_tokens: Annotated[int, typer.Option(min=1, help="text tokens of the prompt")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What routing would do to a model: layers found, tokens, FLOPs and cache, without its weights."""
    from .. import api

    with _console.status("capturing the decoder on the meta device"):
        report = api.inspect(_meta_model(model), tier, method=method, action=action, schedule=schedule)
    report = report.at(visual_tokens=visual_tokens, text_tokens=text_tokens)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        _console.print(report)


@app.command()
@_refusals()
def configs(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """The configurations of the official Reroute release, with what they truly average and cost."""
    from ..analysis.paper_configs import paper_configs

    entries = paper_configs()
    if as_json:
        print(json.dumps([_record(entry) for entry in entries]))
        return
    for family in dict.fromkeys(entry.family for entry in entries):
        _console.print(_family_table(family, [e for e in entries if e.family == family]))
    _console.print("576 visual and 40 text tokens, 16-bit cache, scoring counted.")
    _console.print("Bold: more than 2 tokens away from the tier in the name.")


@app.command()
@_refusals()
def methods(
    tier: Annotated[
        float, typer.Option(help="tier of the costs: 192, 128, 64, or the share of tokens kept")
    ] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The ways to choose tokens: what they rank by, where they decide, and what they cost at a tier."""
    from ..analysis.method_overview import compare_methods, methods_table

    rows = compare_methods(tier)
    if as_json:
        print(json.dumps([row.to_dict() for row in rows]))
        return
    _console.print(methods_table(rows))
    for row in rows:
        own = f"{row.positions} positions, {row.default_tokens:.0f} of 576 tokens if no tier is named"
        _console.print(f"{row.name}: {row.source}; {own}.", highlight=False, soft_wrap=True)


def _family_table(family: str, entries: Sequence["PaperConfig"]) -> Table:
    table = Table(title=f"{family}, 7B decoder", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading in ("configuration", "layers", "kept of 576"):
        table.add_column(heading, no_wrap=True)
    for heading in ("mean", "TFLOPs", "MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in entries:
        config, cost = entry.config, entry.cost
        off = entry.tier is not None and abs(entry.average_tokens - entry.tier) > 2
        table.add_row(
            entry.name.removeprefix(f"{family}/"),
            " ".join(map(str, config.decision_layers)) if config else "",
            " ".join(map(str, config.keep_counts())) if config else "",
            Text(f"{entry.average_tokens:.1f}", style="bold" if off else ""),
            f"{cost.flops / 1e12:.2f}",
            f"{cost.kv_bytes / 2**20:.1f}",
        )
    return table


def _record(entry: "PaperConfig") -> dict[str, Any]:
    config = entry.config
    return {
        "name": entry.name,
        "action": config.action if config else None,
        "decision_layers": list(config.decision_layers) if config else [],
        "keep_counts": list(config.keep_counts()) if config else [],
        "average_tokens": entry.average_tokens,
        "flops": entry.cost.flops,
        "kv_bytes": entry.cost.kv_bytes,
    }


@app.command()
@_refusals()
def demo(
    backend: Annotated[str, typer.Option(help=" or ".join(BACKENDS))] = "inductor",
    scene: Annotated[
        int, typer.Option(help="number of a generated scene; 8 is one where deleting loses the thing")
    ] = 8,
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("demo"),
) -> None:
    """Ask a small trained model for a thing in a scene: unrouted, with deleted and with routed tokens."""
    _quiet_imports()
    from ..lowering import check_backend
    from .demo import run

    check_backend(backend)
    run(backend, _console, scene, out)


def _quiet_imports() -> None:
    """Show errors only of what torch and torchao log as they are imported: neither is what the demo is about."""
    import logging

    import torch

    torch._logging.set_logs(all=logging.ERROR)  # type: ignore[attr-defined]
    logging.getLogger("torchao").setLevel(logging.ERROR)


@app.command()
@_refusals()
def visualize(
    model: Annotated[str, typer.Argument(help="model id or folder with weights, or 'demo' for a small one")],
    out: Annotated[Path, typer.Argument(help="folder for the pictures")],
    prompt: Annotated[str, typer.Option(help="text behind the picture")],
    image: Annotated[Path, typer.Option(help="picture")],
    tier: Annotated[float | None, typer.Option(help=_TIER)] = None,
    method: Annotated[str, typer.Option(help=_METHOD)] = "pdrop",
    action: Annotated[str, typer.Option(help=", ".join(ACTIONS))] = "compact_route_stagewise",
    new_tokens: Annotated[int, typer.Option(min=1, help="most tokens of the answer")] = 64,
    device: Annotated[str, typer.Option(help=_DEVICE)] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
) -> None:
    """Draw which visual tokens ran through each stage, how they were scored, and the answer."""
    from .. import api
    from ..loading.models_by_name import check_device, load_model, read_config
    from ..loading.prompts import make_batch, read_image
    from ..visualizing import check_visualize
    from ..visualizing import visualize as draw

    check_visualize(out)
    check_device(device, dtype)
    picture = read_image(image)
    config = read_config(model, tier, method, action)
    with _errors.status("loading and routing"):
        loaded = load_model(model, device, dtype)
        inputs = make_batch(loaded.processor, loaded.model, 1, prompt, picture)
        routed = api.compile(loaded.model, config=config, backend="eager")
    page = draw(routed, inputs, out, loaded.processor, max_new_tokens=new_tokens)
    _console.print(f"Written: {page} and {page.with_name('prompt-0.png')}", soft_wrap=True)


@app.command()
@_refusals()
def bench(
    model: Annotated[str, typer.Argument(help="model id or folder with weights, or 'demo' for a small one")],
    tier: Annotated[float | None, typer.Option(help=_TIER)] = None,
    batch: Annotated[str, typer.Option(help="rows of each batch, such as 1,8")] = "1",
    method: Annotated[str, typer.Option(help=_METHOD)] = "pdrop",
    action: Annotated[str, typer.Option(help=", ".join(ACTIONS))] = "compact_route_stagewise",
    backend: Annotated[str, typer.Option(help=" or ".join(BACKENDS))] = "inductor",
    new_tokens: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="measured rounds")] = 10,
    image: Annotated[
        Path | None, typer.Option(help="picture for all rows; generated ones if left out")
    ] = None,
    prompt: Annotated[str, typer.Option(help="text behind the picture")] = "Describe the image.",
    device: Annotated[str, typer.Option(help=_DEVICE)] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="file for all samples")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="picture of the times, .png or .svg")
    ] = None,
) -> None:
    """Time a model in eager mode, compiled without routing, and routed: first token, decoding, generate."""
    import torch

    from .. import api
    from ..benchmarking import benchmark, check_benchmark, check_plot, plot_results
    from ..common.json_files import check_file, write_json
    from ..loading.models_by_name import check_device, load_model, read_config
    from ..loading.prompts import make_batch, read_image
    from ..lowering import check_backend, check_tensorrt

    sizes = _batch_sizes(batch)
    check_backend(backend)
    check_device(device, dtype)
    if backend == "tensorrt":
        check_tensorrt(torch.device(device))
    picture = read_image(image) if image else None
    if json_file:
        check_file(json_file)
    if plot_file:
        check_plot(plot_file)
    config = read_config(model, tier, method, action)
    with _errors.status("loading and routing"):
        loaded = load_model(model, device, dtype)
        batches = [make_batch(loaded.processor, loaded.model, rows, prompt, picture) for rows in sizes]
        routed = api.compile(loaded.model, config=config, backend=backend)
    amounts = {"new_tokens": new_tokens, "rounds": rounds}
    for inputs in batches:
        check_benchmark(loaded.model, routed, inputs, **amounts)
    if picture is None:
        _errors.print("The pictures are generated ones; --image takes your own.")
    results = []
    for inputs in batches:
        results.append(benchmark(loaded.model, routed, inputs, progress=True, **amounts))
        _console.print(results[-1])
        if json_file:
            write_json(json_file, [result.to_dict() for result in results])
    if plot_file:
        plot_results(results, plot_file)


@app.command()
@_refusals()
def export(
    model: Annotated[str, typer.Argument(help="model id or folder with weights, or 'demo' for a small one")],
    out: Annotated[Path, typer.Argument(help="folder to make")],
    tier: Annotated[float | None, typer.Option(help=_TIER)] = None,
    method: Annotated[str, typer.Option(help=_METHOD)] = "pdrop",
    action: Annotated[str, typer.Option(help=", ".join(ACTIONS))] = "compact_route_stagewise",
    format: Annotated[str, typer.Option(help=", ".join(FORMATS))] = "aot",
    device: Annotated[str, typer.Option(help=_DEVICE)] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    batch: Annotated[int | None, typer.Option(help="most rows of a call")] = None,
    length: Annotated[int | None, typer.Option(help="most tokens of a row")] = None,
    image_tokens: Annotated[int | None, typer.Option(help="most visual tokens of a picture")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an artifact")] = False,
) -> None:
    """Write a routed model as an artifact that generates without the model's class."""
    from .. import api, artifact
    from ..loading.models_by_name import check_device, load_model, read_config

    check_device(device, dtype)
    artifact.check_export(format, device)
    config = read_config(model, tier, method, action)
    with _errors.status("loading and routing"):
        loaded = load_model(model, device, dtype)
        routed = api.compile(loaded.model, config=config, backend="eager")
    asked = {"batch": batch, "length": length, "image_tokens": image_tokens}
    limits = replace(
        artifact.default_limits(routed),
        **{name: size for name, size in asked.items() if size is not None},
    )
    artifact.export(
        routed,
        out,
        format=format,
        limits=limits,
        processor=loaded.processor,
        overwrite=overwrite,
        progress=True,
    )
    _console.print(artifact.ArtifactReport.of(out))


@app.command()
@_refusals()
def run(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="folder that export wrote")],
    prompt: Annotated[str, typer.Option(help="text behind the picture")],
    image: Annotated[Path, typer.Option(help="picture")],
    new_tokens: Annotated[int, typer.Option(min=1, help="most tokens to generate")] = 128,
    device: Annotated[str | None, typer.Option(help=f"{_DEVICE}; as exported if left out")] = None,
) -> None:
    """Answer a prompt with an artifact, word by word."""
    from transformers import TextStreamer

    from ..artifact import load
    from ..errors import ConfigError
    from ..loading.prompts import make_batch, read_image

    picture = read_image(image)
    with _errors.status("loading"):
        model = load(path, device=device)
        if model.processor is None:
            raise ConfigError(f"{path} has no processor; expected one. Export it with processor=...")
        inputs = make_batch(model.processor, model, 1, prompt, picture)
    streamer = TextStreamer(model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=streamer)


@app.command()
@_refusals()
def show(
    path: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="folder that export wrote")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """What an artifact holds, without loading it."""
    from ..artifact import ArtifactReport

    report = ArtifactReport.of(path)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        _console.print(report)


@app.command()
@_refusals()
def tasks(
    out: Annotated[Path, typer.Argument(help="folder for task files and data")],
    count: Annotated[int, typer.Option(min=1, help="prompts of each task on generated scenes")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="other seeds have other scenes")] = 0,
) -> None:
    """Write tasks for lmms-eval: two on generated scenes with their data, and the paper's by model family."""
    from ..evals.tasks import FAMILIES, paper_tasks, write_tasks

    names = write_tasks(out, count, seed)
    _console.print(f"{len(names)} tasks in {out}: lmms-eval --include_path {out} --tasks ...", soft_wrap=True)
    _console.print(f"generated scenes: {','.join(names[:2])}", soft_wrap=True)
    for family in FAMILIES:
        _console.print(f"the paper's, {family}: {','.join(paper_tasks(family))}", soft_wrap=True)


def _batch_sizes(given: str) -> list[int]:
    from ..errors import ConfigError

    sizes = given.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(
            f"batch is {given!r}; expected whole numbers of 1 or more with commas between, such as 1,8."
        )
    return [int(size) for size in sizes]


def _meta_model(name: str) -> Any:
    """A model without weights from an id, a folder or a config file."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from ..errors import ConfigError, UnsupportedModelError, first_line

    path = Path(name)
    if path.suffix == ".json" and not path.is_file():
        raise ConfigError(f"model is {name!r}; expected an existing config.json.")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model is {name!r}; expected a model id, a folder or a config.json. {first_line(error)}"
        ) from error
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    except ValueError as error:
        raise UnsupportedModelError(
            f"{type(config).__name__} is no vision-language model that transformers can build; expected one such "
            f"as LLaVA-1.5 or Qwen2.5-VL."
        ) from error


if __name__ == "__main__":
    app()
