"""`reroute-fx bench`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Action,
    Backend,
    Config,
    Device,
    Dtype,
    Method,
    Model,
    Pool,
    Revision,
    Schedule,
    Tier,
)
from .terminal import MESSAGES, OUTPUT, refusals


@refusals()
def bench(
    model: Model,
    tier: Tier = None,
    method: Method = None,
    action: Action = None,
    schedule: Schedule = None,
    pool: Pool = None,
    config: Config = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "inductor",
    batch_size: Annotated[
        str, typer.Option(metavar="N,...", help="rows of a call; with commas, one after the other: 1,8")
    ] = "1",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="tokens that every row generates")
    ] = 64,
    num_iters: Annotated[int, typer.Option(min=1, metavar="N", help="measured rounds")] = 10,
    warmup: Annotated[int, typer.Option(min=0, metavar="N", help="rounds before them, not measured")] = 1,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="picture for all rows", show_default="generated ones"),
    ] = None,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="text behind the picture")
    ] = "Describe the image.",
    output_json: Annotated[Path | None, typer.Option(metavar="FILE", help="for all samples")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="for a picture of the times, .png or .svg")
    ] = None,
) -> None:
    """Time a model in eager mode, compiled without routing, and routed: first token, decoding, generate."""
    import torch

    from .. import api
    from ..benchmarking import benchmark, check_benchmark, plot_results
    from ..common.json_files import check_file, write_json
    from ..common.plot_files import check_plot
    from ..loading.models_by_name import choose_device, load_model, read_routing
    from ..loading.prompts import make_batch, read_image
    from ..lowering import check_backend, check_tensorrt

    sizes = _batch_sizes(batch_size)
    check_backend(backend)
    place = choose_device(device, dtype)
    if backend == "tensorrt":
        check_tensorrt(torch.device(place))
    picture = read_image(image) if image else None
    if output_json:
        check_file(output_json)
    if plot:
        check_plot(plot)
    routing = read_routing(
        model,
        revision,
        tier=tier,
        method=method,
        action=action,
        schedule=schedule,
        pool=pool,
        config=config,
    )
    with MESSAGES.status("loading and routing"):
        loaded = load_model(model, place, dtype, revision)
        batches = [make_batch(loaded.processor, loaded.model, rows, prompt, picture) for rows in sizes]
        routed = api.compile(loaded.model, config=routing, backend=backend)
    amounts = {"new_tokens": max_new_tokens, "rounds": num_iters, "warmup": warmup}
    for inputs in batches:
        check_benchmark(loaded.model, routed, inputs, **amounts)
    if picture is None:
        MESSAGES.print("The pictures are generated ones; --image takes your own.")
    results = []
    for inputs in batches:
        results.append(benchmark(loaded.model, routed, inputs, progress=True, **amounts))
        OUTPUT.print(results[-1])
        if output_json:
            write_json(output_json, [result.to_dict() for result in results])
    if plot:
        plot_results(results, plot)


def _batch_sizes(given: str) -> list[int]:
    from ..errors import ConfigError

    sizes = given.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(
            f"batch-size is {given!r}; expected whole numbers of 1 or more with commas between, such as 1,8."
        )
    return [int(size) for size in sizes]
