"""The table of families in docs/models.md, made from the record of `families.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- families: by benchmarks/families.py --table -->\n\n", "<!-- end of families -->"
COLUMNS = ("compiles", "identity", "batch", "later turn", "video", "parts", "onnx", "aot")
EXACT = 1e-5
"""Differences, as a share of the largest logit, that are another order of adding up."""


def is_exact(answer: Any) -> bool:
    return answer is True or (isinstance(answer, float) and answer <= EXACT)


def table(families: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row for each family, and the reasons below, each with a number."""
    reasons: list[str] = []

    def cell(answer: Any, asked: bool) -> str:
        if not asked:
            return ""
        if answer is None:
            return "-"
        if is_exact(answer):
            return "yes"
        said = answer if isinstance(answer, str) else f"differs by {answer:.1e} of the largest logit"
        if said not in reasons:
            reasons.append(said)
        return f"no [{reasons.index(said) + 1}]"

    rows = [
        f"| {name} | `{found['class']}` | "
        + " | ".join(cell(found.get(column), column in found) for column in COLUMNS)
        + " |"
        for name, found in families.items()
    ]
    head = f"| family | class | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}"
    notes = [f"{number}. `{said.replace('`', '')}`" for number, said in enumerate(reasons, 1)]
    return "\n".join([_caption(families), "", head, *rows, "", *notes]) + "\n"


def _caption(families: Mapping[str, Mapping[str, Any]]) -> str:
    dates = sorted({found["date"] for found in families.values()})
    versions = sorted({", ".join(map(" ".join, found["versions"].items())) for found in families.values()})
    counts = [
        f"{sum(is_exact(found.get(column)) for found in families.values())} {what}"
        for column, what in (
            ("compiles", "compile"),
            ("identity", "equal the unrouted model if everything is kept"),
            ("batch", "have equal rows alone and in a padded batch"),
        )
    ]
    written = sum(any(is_exact(found.get(form)) for form in ("onnx", "aot")) for found in families.values())
    counts.append(f"{written} have an artifact that answers as they do")
    return (
        f"Of {len(families)} families {', '.join(counts)}. Asked {' to '.join(sorted({dates[0], dates[-1]}))} "
        f"with {'; '.join(versions)}."
    )


def page_with(families: Mapping[str, Mapping[str, Any]], page: str) -> str:
    """The page with another table between its two marks."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(
            f"{PAGE} lacks one of the marks {START.strip()!r} and {END!r}; expected both, in this order."
        )
    return before + start + table(families) + "\n" + end + after


def write_table(families: Mapping[str, Mapping[str, Any]]) -> None:
    PAGE.write_text(page_with(families, PAGE.read_text()))
