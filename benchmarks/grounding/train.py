"""Train the small LLaVA of the grounding study from scratch, on scenes that are drawn as they are needed.

First the tower: each patch says which thing it lies on and where that thing's box is, and the class token which kinds
of things there are; its heads are thrown away. Then, with the tower frozen as in LLaVA-1.5, projector and decoder:
questions and answers, at first with a quarter of the layers, because that costs a quarter and finds the way as well. A
run that was stopped goes on where it saved its state.

    python benchmarks/grounding/train.py runs/grounding
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from packing import IGNORED, PACKED, Packed, pack
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from small_llava import DECODER_LAYERS, IMAGE, PATCH, WIDTH, build_model, build_processor, grow
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from reroute_fx.grounding.questions import questions
from reroute_fx.grounding.scenes import COLOURS, CROWD, SHAPES, SIDE, SIZES, TEXTURES, Scene, scene

REFERENCES, CHECKS = 8, 6
"""Questions about each picture for a box, and for yes or no."""
SHALLOW = 4
"""Decoder layers that are trained first."""
_LONGEST = 28
"""Tokens of question and answer; of the few longer ones none is trained on."""
_WARM_UP = 100
_RATES = {"matrices": 1.0, "words read": 20.0, "words written": 3.0, "others": 1.0}
_SAVE_EVERY = 100
_SHOW_EVERY = 20
_FIELDS = {"size": tuple(SIZES), "texture": TEXTURES, "colour": tuple(COLOURS), "shape": SHAPES}
_KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
_PATCHES = SIDE // PATCH
_NOTHING = -100


class TowerHeads(nn.Module):
    """What the tower is trained to say: of each patch the thing that it lies on, of the picture the kinds in it."""

    def __init__(self) -> None:
        super().__init__()
        self.covered = nn.Linear(WIDTH, 1)
        self.words = nn.ModuleDict({field: nn.Linear(WIDTH, len(words)) for field, words in _FIELDS.items()})
        self.box = nn.Linear(WIDTH, 4)
        self.kinds = nn.Linear(WIDTH, len(_KINDS))

    def forward(self, patches: Tensor, picture: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses; `[B, N, d]` and `[B, d]` against what `tower_labels` says."""
        on = labels["size"] != _NOTHING
        covered = self.covered(patches).squeeze(-1)
        losses = {"covered": F.binary_cross_entropy_with_logits(covered, on.to(covered.dtype))}
        for field, head in self.words.items():
            losses[field] = F.cross_entropy(head(patches[on]), labels[field][on])
        losses["box"] = 5 * F.l1_loss(self.box(patches[on]).sigmoid(), labels["box"][on])
        losses["kinds"] = F.binary_cross_entropy_with_logits(self.kinds(picture), labels["kinds"])
        return losses


def tower_labels(scene: Scene) -> dict[str, np.ndarray]:
    """For each patch, by rows, the thing in whose box its centre lies; for the picture the kinds of things."""
    labels: dict[str, np.ndarray] = {f: np.full((_PATCHES, _PATCHES), _NOTHING) for f in _FIELDS}
    labels["box"] = np.zeros((_PATCHES, _PATCHES, 4), dtype=np.float32)
    labels["kinds"] = np.zeros(len(_KINDS), dtype=np.float32)
    centres = (np.arange(_PATCHES) + 0.5) * PATCH
    for thing in scene.things:
        columns, rows = (
            np.flatnonzero((centres >= low) & (centres < low + thing.side)) for low in thing.corner
        )
        here = np.ix_(rows, columns)
        for field, words in _FIELDS.items():
            labels[field][here] = words.index(getattr(thing, field))
        labels["box"][here] = thing.box
        labels["kinds"][_KINDS.index((thing.colour, thing.shape))] = 1
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in labels.items() if name != "kinds"}
    return flat | {"kinds": labels["kinds"]}


@dataclass(frozen=True)
class Recipe:
    """How a phase is trained.

    Attributes:
        steps: optimizer steps.
        batch: pictures in each.
        rate: the highest learning rate, after warming up.
        first_scene: number of the first training scene, so that phases see different ones.
        decay: whether a cosine takes the rate to 0.
        ramp: steps over which scenes fill up, from one or two things to as many as the test's.
    """

    steps: int
    batch: int
    rate: float
    first_scene: int
    decay: bool = True
    ramp: int = 0

    def crowd(self, step: int) -> tuple[int, int]:
        """Fewest and most things in the scenes of a step."""
        if step >= self.ramp:
            return CROWD
        return 1, 2 + (CROWD[1] - 2) * step // self.ramp


class Batches(IterableDataset[Any]):
    """The batches of a recipe from a step on, the same for the same step."""

    def __init__(self, recipe: Recipe, start: int, make: Callable[[list[Scene]], Any], split: str) -> None:
        self.recipe, self.start, self.make, self.split = recipe, start, make, split

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.start, self.recipe.steps):
            first = self.recipe.first_scene + step * self.recipe.batch
            yield self.make(
                [scene(self.split, first + i, self.recipe.crowd(step)) for i in range(self.recipe.batch)]
            )


class Maker:
    """Batches for both phases out of scenes."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.prefix = self._ids(f"USER: {IMAGE * _PATCHES**2}\n", bos=True)

    def tower(self, scenes: list[Scene]) -> tuple[Tensor, dict[str, Tensor]]:
        labels = [tower_labels(each) for each in scenes]
        stacked = {name: torch.from_numpy(np.stack([each[name] for each in labels])) for name in labels[0]}
        return self._pixels(scenes), stacked

    def decoder(self, scenes: list[Scene]) -> Packed:
        turns = [self._turns(each) for each in scenes]
        return pack(self._pixels(scenes), self.prefix, turns, _LONGEST, self.processor.tokenizer.pad_token_id)

    def _turns(self, scene: Scene) -> list[tuple[list[int], list[int]]]:
        """As many questions for every scene: where there are fewer, the first ones come again."""
        boxes, truths = questions(scene, REFERENCES, CHECKS)
        end = self.processor.tokenizer.eos_token_id
        asked = [
            (self._ids(f"{q.text} ASSISTANT:"), [*self._ids(f" {q.answer}"), end]) for q in boxes + truths
        ]
        fitting = [turn for turn in asked if sum(map(len, turn)) <= _LONGEST]
        return list(islice(cycle(fitting), REFERENCES + CHECKS))

    def _ids(self, text: str, bos: bool = False) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=bos)["input_ids"])

    def _pixels(self, scenes: list[Scene]) -> Tensor:
        pictures = [each.picture for each in scenes]
        return self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


def tower_features(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What LLaVA takes of each patch `[B, N, d]`, and the class token after the last layer `[B, d]`."""
    out = model.model.vision_tower(pixels, output_hidden_states=True)
    return out.hidden_states[model.config.vision_feature_layer][:, 1:], out.pooler_output


def decoder_logits(model: Any, batch: Packed) -> Tensor:
    """Logits `[answer tokens, V]` where `batch.labels` has a label."""
    with torch.no_grad():
        features, _ = tower_features(model, batch.pixel_values)
    text = model.model.language_model
    embeds = text.embed_tokens(batch.input_ids)
    pictures = model.model.multi_modal_projector(features).to(embeds.dtype)
    embeds = embeds.masked_scatter((batch.input_ids == model.config.image_token_id)[..., None], pictures)
    hidden = text(
        inputs_embeds=embeds,
        position_ids=batch.position_ids,
        packed_lengths=(batch.prefix, batch.length),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[batch.labels != IGNORED])


class Phase:
    """A phase of training with its optimizers, that can be saved and taken up again."""

    def __init__(
        self, name: str, recipe: Recipe, model: Any, parameters: list[nn.Parameter], loss: Any
    ) -> None:
        self.name, self.recipe, self.model, self.loss = name, recipe, model, loss
        self.parameters, self.step = parameters, 0
        self.optimizers = _optimizers(model, parameters)

    def run(self, make: Callable[[list[Scene]], Any], save: Callable[[], None], progress: Progress) -> None:
        """Train to the last step, saving now and then."""
        batches = Batches(self.recipe, self.step, make, "train")
        task = progress.add_task(self.name, total=self.recipe.steps, completed=self.step, shown="")
        for batch in DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4):
            shown = self._train(batch)
            progress.update(task, completed=self.step)
            if self.step % _SHOW_EVERY == 0:
                progress.update(task, shown=shown())
                if not progress.console.is_terminal:
                    print(f"{time.strftime('%H:%M:%S')} {self.name} {self.step}: {shown()}", flush=True)
            if self.step % _SAVE_EVERY == 0 or self.step == self.recipe.steps:
                save()

    def _train(self, batch: Any) -> Callable[[], str]:
        rate = self.recipe.rate * _share_of_rate(self.step, self.recipe)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["times"] * rate
        with torch.autocast("cpu", torch.bfloat16):
            loss, shown = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return shown

    def state(self) -> dict[str, Any]:
        return {"step": self.step, "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def take_up(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _optimizers(model: Any, parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW for all else; matrices and words take larger steps."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in _RATES}
    for parameter in parameters:
        name = names.get(id(parameter), "")
        if parameter.ndim == 2 and ".layers." in name:
            groups["matrices"].append(parameter)
        elif "embed_tokens" in name or "lm_head" in name:
            groups["words read" if "embed" in name else "words written"].append(parameter)
        else:
            groups["others"].append(parameter)
    matrices, *rest = ({"params": given, "times": _RATES[kind]} for kind, given in groups.items() if given)
    return [
        torch.optim.Muon([matrices], weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _share_of_rate(step: int, recipe: Recipe) -> float:
    if step < _WARM_UP:
        return (step + 1) / _WARM_UP
    if not recipe.decay:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - _WARM_UP) / max(1, recipe.steps - _WARM_UP))


def tower_phase(model: Any, heads: TowerHeads, recipe: Recipe) -> Phase:
    def loss(batch: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, Callable[[], str]]:
        pixels, labels = batch
        losses = heads(*tower_features(model, pixels), labels)
        return sum(losses.values()), lambda: " ".join(f"{name} {value:.3f}" for name, value in losses.items())

    parameters = [*model.model.vision_tower.parameters(), *heads.parameters()]
    return Phase("tower", recipe, model, parameters, loss)


def decoder_phase(name: str, model: Any, recipe: Recipe, maker: Maker) -> Phase:
    tokens = maker.processor.tokenizer.convert_ids_to_tokens(range(len(maker.processor.tokenizer)))
    numbers = torch.tensor(["." in token and len(token) > 2 for token in tokens])
    words = torch.tensor([token in (" yes", " no") for token in tokens])

    def loss(batch: Packed) -> tuple[Tensor, Callable[[], str]]:
        logits = decoder_logits(model, batch).float()
        labels = batch.labels[batch.labels != IGNORED]
        each = F.cross_entropy(logits, labels, reduction="none")

        def shown() -> str:
            right = logits.argmax(-1) == labels
            near = numbers[labels]
            return (
                f"loss {each.mean():.4f} numbers {each[near].mean():.3f} right {right[near].float().mean():.3f} "
                + (f"yes/no {each[words[labels]].mean():.3f} right {right[words[labels]].float().mean():.3f}")
            )

        weights = 1.0 + words[labels]
        return (each * weights).sum() / weights.sum(), shown

    decoder = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    return Phase(name, recipe, model, [p for part in decoder for p in part.parameters()], loss)


def main(
    folder: Annotated[
        Path, typer.Argument(help="Where the state of the run and the trained model are written.")
    ],
    tower_steps: int = 1500,
    shallow_steps: int = 3000,
    deep_steps: int = 3000,
    tower_rate: float = 1e-3,
    decoder_rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train, and write the model in bfloat16 with its processor to FOLDER/model."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    model = build_model(processor, seed)
    text = model.model.language_model
    text.config._attn_implementation = PACKED
    for layer in text.layers:
        layer.compile(dynamic=False)
    maker, heads, place = Maker(processor), TowerHeads(), folder / "state.pt"
    tower = tower_phase(model, heads, Recipe(tower_steps, 32, tower_rate, 0))
    shallow = decoder_phase(
        "shallow",
        model,
        Recipe(shallow_steps, 16, decoder_rate, 10**6, decay=False, ramp=shallow_steps // 2),
        maker,
    )
    deep = decoder_phase("deep", model, Recipe(deep_steps, 16, decoder_rate, 2 * 10**6), maker)

    def save() -> None:
        state = {"model": model.state_dict(), "heads": heads.state_dict()}
        torch.save(state | {phase.name: phase.state() for phase in (tower, shallow, deep)}, f"{place}.new")
        Path(f"{place}.new").replace(place)

    if place.exists():
        state = torch.load(place)
        model.load_state_dict(state["model"])
        heads.load_state_dict(state["heads"])
        for phase in (tower, shallow, deep):
            phase.take_up(state[phase.name])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[shown]}")) as progress:
        tower.run(maker.tower, save, progress)
        model.model.vision_tower.requires_grad_(False)
        text.config.num_hidden_layers = SHALLOW
        shallow.run(maker.decoder, save, progress)
        text.config.num_hidden_layers = DECODER_LAYERS
        if deep.step == 0:
            grow(model, SHALLOW)
        deep.run(maker.decoder, save, progress)
    model.model.language_model.config._attn_implementation = "sdpa"
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


if __name__ == "__main__":
    typer.run(main)
