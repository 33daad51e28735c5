"""What tiny models of many families can do: with random weights, through their own classes, on CPU.

    python benchmarks/families.py [NAME...] [--format onnx] [--format aot] [--table]

Asks each family, or those that are named, and keeps the record of the others; what was answered already with these
versions is not asked again unless it is named. `--format` also writes an artifact of that format, loads it and compares
its answers: 25 processor seconds for ONNX, 56 for machine code (LLaVA over Llama). `--table` writes the table of
docs/models.md from the record and asks nothing.
"""

import functools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from families_table import write_table
from record import RESULTS, write
from rich.console import Console
from rich.progress import track
from tiny_families import FAMILIES, IMAGE, VIDEO, Family, prompts, row

import reroute_fx
from reroute_fx import RerouteError, RoutingConfig
from reroute_fx.artifact.manifest import FORMATS
from reroute_fx.capture import capture_decoder
from reroute_fx.capture.positions import find_positions
from reroute_fx.capture.vision_tower import capture_vision_tower
from reroute_fx.errors import first_line

RECORD = RESULTS / "families.json"
EVERYTHING, ROUTING = RoutingConfig((1, 2), (1.0, 1.0)), RoutingConfig((1, 2), (0.5, 0.25))
Inputs = Mapping[str, torch.Tensor]


def ask(family: Family, known: Mapping[str, Any], formats: Sequence[str]) -> dict[str, Any]:
    """An answer for each column of the table that `known` lacks; a text is the reason why there is no other."""
    model = family.build()
    found: dict[str, Any] = {"class": type(model).__name__, "versions": versions(), "compiles": True}
    try:
        half = reroute_fx.compile(model, config=ROUTING, backend="eager")
    except RerouteError as error:
        return found | {"compiles": reason(error)}
    full = functools.cache(lambda: reroute_fx.compile(model, config=EVERYTHING, backend="eager"))
    given = prompts(model, family)
    questions: dict[str, Callable[[], Any]] = {
        "identity": lambda: identity(full(), model, given),
        "batch": lambda: batch(half, given),
        "later turn": lambda: later_turn(full(), model, row(given, 0)),
        "video": lambda: (
            identity(full(), model, prompts(model, family, videos=True)) if family.videos else None
        ),
        "parts": lambda: parts(model),
        **{form: functools.partial(artifact, half, given, form) for form in formats},
    }
    missing = [column for column in questions if column not in known]
    return {**found, **known, **{column: answer(questions[column]) for column in missing}}


def answer(question: Callable[[], Any]) -> Any:
    try:
        return question()
    except Exception as error:
        return reason(error)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def greedy(model: Any, given: Mapping[str, Any], **options: Any) -> Any:
    """Tokens of an answer without placeholders, so that a later turn may hold it."""
    fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [IMAGE, VIDEO]}
    return model.generate(**given, **{"max_new_tokens": 12, **fixed, **options})


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, as a share of the largest value."""
    return float(((found - expected).abs().max() / expected.abs().max()).item())


def identity(full: Any, model: Any, given: Inputs) -> Any:
    """How much logits of a padded batch differ if everything is kept, and whether 12 greedy tokens are equal."""
    real = given["attention_mask"].bool()
    off = difference(full(**given).logits[real], model(**given).logits[real])
    return (
        off if torch.equal(greedy(full, given), greedy(model, given)) else f"other tokens; logits {off:.1e}"
    )


def batch(half: Any, given: Inputs) -> float:
    """How much the logits of routed rows of a padded batch differ from those of the rows alone."""
    real, together = given["attention_mask"].bool(), half(**given).logits
    return max(difference(together[i][real[i]], half(**row(given, i)).logits[0]) for i in range(len(real)))


def later_turn(full: Any, model: Any, given: Inputs) -> Any:
    """Whether what follows a turn of text on the cache is equal if everything is kept."""
    answers = []
    for each in (full, model):
        first = greedy(each, given, max_new_tokens=4, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[9, 11, 13]])], dim=1)
        asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        answers.append(greedy(each, asked, max_new_tokens=6, past_key_values=first.past_key_values))
    return True if torch.equal(*answers) else "other tokens"


def parts(model: Any) -> bool:
    """Whether the tower and the positions can be exported, which an artifact needs besides the routed programs."""
    capture_vision_tower(model)
    find_positions(model, capture_decoder(model).position_rank)
    return True


def artifact(half: Any, given: Inputs, form: str) -> Any:
    """How much logits of an artifact differ from those of the exported model, if 12 greedy tokens are equal."""
    real = given["attention_mask"].bool()
    with tempfile.TemporaryDirectory() as folder:
        loaded = reroute_fx.load(reroute_fx.export(half, Path(folder) / "artifact", format=form))
        off = difference(loaded(**given).logits[real], half(**given).logits[real])
        same = torch.equal(greedy(loaded, given), greedy(half, given))
    return off if same else f"other tokens; logits {off:.1e}"


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers")}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Families; all if left out.")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help=f"Also write artifacts: {', '.join(FORMATS)}.")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Write the table in docs/models.md only.")] = False,
) -> None:
    known: dict[str, Any] = json.loads(RECORD.read_text())["families"] if RECORD.exists() else {}
    if table:
        write_table(known)
        return
    asked = {name: held(known.get(name, {})) for name in names or FAMILIES}
    if names:
        kept = set(FORMATS).difference(formats or [])
        asked = {
            name: {column: answers[column] for column in kept & answers.keys()}
            for name, answers in asked.items()
        }
    unasked = [name for name, answers in asked.items() if lacks(answers, formats or [])]
    for name in track(unasked, console=Console(stderr=True), transient=True):
        with torch.no_grad():
            found = ask(FAMILIES[name], asked[name], formats or [])
        known[name] = {**found, "date": datetime.now(UTC).date().isoformat()}
        # After each family: a record that breaks off goes on where it was.
        write("families", {"families": {n: known[n] for n in FAMILIES if n in known}}, RESULTS)
    write_table(known)


def held(answers: Mapping[str, Any]) -> dict[str, Any]:
    """The answers that need not be asked again: none of other versions."""
    return dict(answers) if answers.get("versions") == versions() else {}


def lacks(answers: Mapping[str, Any], formats: Sequence[str]) -> bool:
    """Whether there is something to ask: what doesn't compile has no artifacts."""
    if answers.get("compiles") is not True:
        return "compiles" not in answers
    return not {"identity", "parts", *formats} <= answers.keys()


if __name__ == "__main__":
    typer.run(main)
