"""Lessons for the decoder: scenes as the frozen tower sees them, with questions and answers in tokens.

They are made once and gone over several times, because drawing and asking costs. Scenes with few things, of which a
decoder is told first, are new in each step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packing import Packed, Turn, lay_out, pack
from rich.progress import Progress
from small_llava import IMAGE
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tower import PATCHES, tower_features, tower_labels

from reroute_fx.grounding.questions import near_misses, questions
from reroute_fx.grounding.scenes import Scene, scene

REFERENCES, CHECKS, MISSES = 10, 5, 9
"""Questions that are made about each picture: for a box, and for yes or no."""
_ROWS, _LONGEST = 14, 28
"""Rows, and tokens of each; questions that find no room are left out, and the few longer ones."""
_DRAWN = 32


@dataclass(frozen=True)
class Lessons:
    """Scenes as the tower sees them, and as many rows of questions about each.

    Attributes:
        features: `[S, N, d]` bfloat16, what the projector reads.
        labels: `tower_labels` of each scene, stacked.
        questions, answers, turns: `[S, Q, R]` int16, what `lay_out` returns for each scene.
        prefix: tokens before the question, with those of the picture.
    """

    features: Tensor
    labels: dict[str, Tensor]
    questions: Tensor
    answers: Tensor
    turns: Tensor
    prefix: list[int]

    def batches(self, size: int, start: int, steps: int, seed: int) -> Iterator[Tensor]:
        """Indices `[size]` of scenes for the steps from `start` on; each scene once before any comes again."""
        in_epoch = len(self.features) // size
        for step in range(start, steps):
            order = torch.Generator().manual_seed(seed * 1000 + step // in_epoch)
            shuffled = torch.randperm(len(self.features), generator=order)
            yield shuffled[step % in_epoch * size :][:size]

    def labels_of(self, chosen: Tensor) -> dict[str, Tensor]:
        return {name: value[chosen] for name, value in self.labels.items()}

    def pack(self, chosen: Tensor, pictures: Tensor) -> Packed:
        """The chosen scenes' questions about pictures as the decoder reads them `[B, N, d]`."""
        return pack(pictures, self.prefix, self.questions[chosen], self.answers[chosen], self.turns[chosen])


class LessonMaker:
    """Makes lessons out of scenes, but for the tower's part."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.prefix = self._ids(f"USER: {IMAGE * PATCHES**2}\n", bos=True)

    def pixels(self, scenes: Sequence[Scene]) -> Tensor:
        pictures = [each.picture for each in scenes]
        return self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]

    def labels(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        labels = [tower_labels(each) for each in scenes]
        return {name: torch.from_numpy(np.stack([each[name] for each in labels])) for name in labels[0]}

    def turns(self, scenes: Sequence[Scene]) -> tuple[Tensor, ...]:
        """What `lay_out` returns for the questions about each scene, all `[B, Q, R]` int16."""
        pad = self.processor.tokenizer.pad_token_id
        laid_out = [lay_out(self._turns(each), _ROWS, _LONGEST, pad) for each in scenes]
        return tuple(torch.tensor(each, dtype=torch.int16) for each in zip(*laid_out, strict=True))

    def _turns(self, scene: Scene) -> list[Turn]:
        """Questions of all kinds in turn, so that what finds no room is of any kind."""
        boxes, truths = questions(scene, REFERENCES, CHECKS)
        end = self.processor.tokenizer.eos_token_id
        mixed = zip_longest(boxes, truths, near_misses(scene, MISSES))
        asked = [question for each in mixed for question in each if question is not None]
        return [(self._ids(f"{q.text} ASSISTANT:"), [*self._ids(f" {q.answer}"), end]) for q in asked]

    def _ids(self, text: str, bos: bool = False) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=bos)["input_ids"])


class _Drawn(Dataset[Any]):
    def __init__(self, maker: LessonMaker, first: int, count: int, crowd: tuple[int, int]) -> None:
        self.maker, self.numbers, self.crowd = maker, range(first, first + count), crowd

    def __len__(self) -> int:
        return -(-len(self.numbers) // _DRAWN)

    def __getitem__(self, index: int) -> Any:
        scenes = [scene("train", n, self.crowd) for n in self.numbers[index * _DRAWN :][:_DRAWN]]
        return self.maker.pixels(scenes), self.maker.labels(scenes), self.maker.turns(scenes)


def make_lessons(
    model: Any, maker: LessonMaker, first: int, count: int, crowd: tuple[int, int], progress: Progress
) -> Lessons:
    """Lessons about `count` training scenes from number `first` on, with so many to so many things."""
    drawn = DataLoader(_Drawn(maker, first, count, crowd), batch_size=None, num_workers=2)
    features, labels, laid_out = [], [], []
    task = progress.add_task("{} to {} things".format(*crowd), total=len(drawn), shown="")
    for pixels, seen, asked in drawn:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features.append(tower_features(model, pixels)[0].bfloat16())
        labels.append(seen)
        laid_out.append(asked)
        progress.advance(task)
    stacked = {name: torch.cat([each[name] for each in labels]) for name in labels[0]}
    return Lessons(torch.cat(features), stacked, *map(torch.cat, zip(*laid_out, strict=True)), maker.prefix)


def kept_lessons(place: Path, *how: Any) -> Lessons:
    """The lessons in a file; if there is none, it is written, with `make_lessons(*how)`."""
    if not place.exists():
        made = make_lessons(*how)
        torch.save(vars(made), f"{place}.new")
        Path(f"{place}.new").replace(place)
    return Lessons(**torch.load(place, mmap=True))


class Told(Dataset[Any]):
    """For each step from `start` on, labels of scenes that were not yet seen, and what `lay_out` returns for them.

    Their questions can be learnt from the labels alone, without a picture and a tower.
    """

    def __init__(
        self, maker: LessonMaker, first: int, crowd: tuple[int, int], size: int, start: int, steps: int
    ) -> None:
        self.maker, self.crowd, self.size = maker, crowd, size
        self.numbers = range(first + start * size, first + steps * size)

    def __len__(self) -> int:
        return len(self.numbers) // self.size

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        scenes = [scene("train", n, self.crowd) for n in self.numbers[index * self.size :][: self.size]]
        return self.maker.labels(scenes), self.maker.turns(scenes)
