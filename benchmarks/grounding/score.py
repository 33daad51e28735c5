"""How well a model, or a run that still trains one, answers by now.

    python benchmarks/grounding/score.py runs/small

prints the share of right answers by kind of question, for scenes of the validation split: minutes for 100 questions of
each of boxes, yes/no questions and near misses.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from contenders import unrouted
from evaluate import record
from small_llava import build_model, build_processor
from summary import kinds_table

from reroute_fx.errors import ConfigError
from reroute_fx.grounding.questions import KINDS, NEAR_MISSES, collect
from reroute_fx.loading.models_by_name import load_model


def model_of_run(folder: Path) -> Any:
    """The model of a run of `train.py decoder`, as far as it is trained.

    Raises:
        ConfigError: it was told of scenes and has seen none.
    """
    state = torch.load(folder / "state.pt")
    if "seen" not in state["phases"]:
        raise ConfigError(
            f"folder is {str(folder)!r}, a run in its phase {list(state['phases'])[-1]!r}; expected one that has begun "
            f"its phase 'seen', before which no picture can be shown to it. Until then its log tells of losses."
        )
    names = [name.split(".") for name in state["model"] if ".language_model.layers." in name]
    layers = len({name[name.index("layers") + 1] for name in names})
    model = build_model(build_processor(), 0, layers)
    model.load_state_dict(state["model"])
    return model.eval()


def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint, or folder of a run of `train.py decoder`.")],
    count: Annotated[int, typer.Option(min=1, help="Questions of each kind.")] = 100,
    split: str = "validation",
) -> None:
    """Ask, and print the scores."""
    if (folder / "state.pt").exists():
        model, processor = model_of_run(folder), build_processor()
    else:
        loaded = load_model(str(folder), "cpu", "float32")
        model, processor = loaded.model, loaded.processor
    records = [
        record(unrouted(model), processor, collect(split, 0, count, kind), 0, kind)
        for kind in (*KINDS, NEAR_MISSES)
    ]
    print(kinds_table(records))


if __name__ == "__main__":
    typer.run(main)
