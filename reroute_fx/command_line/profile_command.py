"""`reroute-fx profile`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype, MaxNewTokens, Model, NumPrompts, Prompts, Revision
from .terminal import MESSAGES, OUTPUT, refusals


@refusals()
def profile(
    model: Model,
    prompts: Prompts = None,
    tier: Annotated[
        float, typer.Option(metavar="192|128|64|SHARE", help="how many tokens stay when recall is counted")
    ] = 128,
    num_prompts: NumPrompts = 64,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="prompts that run together")] = 1,
    max_new_tokens: MaxNewTokens = 32,
    gradient: Annotated[
        bool, typer.Option(help="ask what answers depend on; needs the activations of a batch in memory")
    ] = True,
    output_json: Annotated[
        Path | None, typer.Option("--output-json", "-o", metavar="FILE", help="for all arrays")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="for the heat maps, .png or .svg")] = None,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Show where a model looks when it answers: attention and what answers depend on, by layer and head."""
    from ..common.json_files import check_file
    from ..common.plot_files import check_plot
    from ..loading.models_by_name import choose_device, load_model
    from ..methods.tiers import tier_share
    from ..tuning.profile import profile as take
    from ..tuning.read_prompts import prompts_of

    tier_share(tier)
    place = choose_device(device, dtype)
    if output_json:
        check_file(output_json)
    if plot:
        check_plot(plot)
    pairs = prompts_of(model, prompts, num_prompts)
    with MESSAGES.status("loading"):
        loaded = load_model(model, place, dtype, revision)
    found = take(
        loaded.model,
        pairs,
        processor=loaded.processor,
        tier=tier,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        gradient=gradient,
        progress=True,
    )
    OUTPUT.print(found)
    for proposal in found.proposals(num=3) if gradient else ():
        OUTPUT.print(str(proposal), highlight=False, soft_wrap=True)
    if output_json:
        found.save(output_json)
    if plot:
        found.plot(plot)
