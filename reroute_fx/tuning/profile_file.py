"""A profile as JSON, read without trusting it."""

from dataclasses import dataclass
from typing import ClassVar

from .proposals import SHARES

Numbers = tuple[tuple[float, ...], ...]
"""``[layers, heads]``."""
PER_HEAD = ("attention", "text_attention", "entropy", "lost", "recall", "text_recall", "effect")
OF_GRADIENTS = ("recall", "text_recall", "effect", "recall_curves", "targets")
QUERIES = {"last", "text"}


@dataclass(frozen=True)
class SavedProfile:
    """The fields of a `Profile` in plain numbers, and `shares`, at which recall was counted.

    Raises:
        ValueError: arrays that don't fit each other, or recall at other shares.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    shares: tuple[float, ...]
    model: str
    share: float
    visual_tokens: tuple[int, ...]
    prompts_hash: str
    versions: dict[str, str]
    seconds: float
    attention: Numbers
    text_attention: Numbers
    entropy: Numbers
    lost: Numbers
    recall: Numbers | None
    text_recall: Numbers | None
    effect: Numbers | None
    recall_curves: dict[str, tuple[Numbers, ...]] | None
    targets: tuple[tuple[int, ...], ...] | None
    attended: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        if self.shares != tuple(SHARES):
            raise ValueError(f"shares is {self.shares}; expected {tuple(SHARES)}. Profile again.")
        if len({getattr(self, name) is None for name in OF_GRADIENTS}) != 1:
            raise ValueError(f"of {list(OF_GRADIENTS)} some are null; expected all or none of them.")
        layers, heads = len(self.attention), len(self.attention[0]) if self.attention else 0
        for name in PER_HEAD:
            if (array := getattr(self, name)) is not None:
                _check_shape(name, array, layers, heads)
        if self.recall_curves is not None:
            self._check_curves(self.recall_curves, layers, heads)
        for name in ("targets", "attended"):
            if (rows := getattr(self, name)) is not None and len(rows) != len(self.visual_tokens):
                raise ValueError(f"{name} is of {len(rows)} prompts; expected {len(self.visual_tokens)}.")

    def _check_curves(self, curves: dict[str, tuple[Numbers, ...]], layers: int, heads: int) -> None:
        if set(curves) != QUERIES:
            raise ValueError(f"recall_curves is of {sorted(curves)}; expected {sorted(QUERIES)}.")
        for name, layered in curves.items():
            if len(layered) != layers:
                raise ValueError(f"recall_curves.{name} has {len(layered)} layers; expected {layers}.")
            for number, curve in enumerate(layered):
                _check_shape(f"recall_curves.{name}[{number}]", curve, heads + 1, len(self.shares))


def _check_shape(name: str, array: Numbers, rows: int, columns: int) -> None:
    found = [len(row) for row in array]
    if not rows or not columns or found != [columns] * rows:
        raise ValueError(f"{name} has rows of {found} numbers; expected {rows} rows of {columns}.")
