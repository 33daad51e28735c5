"""`reroute-fx visualize`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Action,
    Config,
    Device,
    Dtype,
    Image,
    MaxNewTokens,
    Method,
    Model,
    Pool,
    Prompt,
    Revision,
    Schedule,
    Tier,
)
from .terminal import MESSAGES, OUTPUT, refusals


@refusals()
def visualize(
    model: Model,
    output_dir: Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="folder for the pictures")],
    prompt: Prompt,
    image: Image,
    tier: Tier = None,
    method: Method = None,
    action: Action = None,
    schedule: Schedule = None,
    pool: Pool = None,
    config: Config = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    max_new_tokens: MaxNewTokens = 64,
) -> None:
    """Draw which visual tokens ran through each stage, how they were scored, and the answer."""
    from .. import api
    from ..loading.models_by_name import choose_device, load_model, read_routing
    from ..loading.prompts import make_batch, read_image
    from ..visualizing import check_visualize
    from ..visualizing import visualize as draw

    check_visualize(output_dir)
    place = choose_device(device, dtype)
    picture = read_image(image)
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
        inputs = make_batch(loaded.processor, loaded.model, 1, prompt, picture)
        routed = api.compile(loaded.model, config=routing, backend="eager")
    page = draw(routed, inputs, output_dir, loaded.processor, max_new_tokens=max_new_tokens)
    OUTPUT.print(f"Written: {page} and {page.with_name('prompt-0.png')}", soft_wrap=True)
