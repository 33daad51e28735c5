"""Train the small LLaVA of the grounding study from scratch.

First the tower: each patch says which thing it lies on and where that thing's box is; its heads are thrown away. Then,
with the tower frozen as in LLaVA-1.5, the projector says it in words and numbers of the decoder, and the decoder learns
to answer: with a quarter of its layers, because that costs a quarter and finds the way as well, about one thing, then
about a few, then about as many as there are in the test; at last with all its layers. A run that was stopped goes on
where it saved its state.

    python benchmarks/grounding/train.py runs/grounding
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from lessons import LessonMaker, Lessons, kept_lessons
from packing import IGNORED, PACKED, Packed
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from small_llava import DECODER_LAYERS, WIDTH, build_model, build_processor, grow, number_waves
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tower import FIELDS, NOTHING, TowerHeads, tower_features

from reroute_fx.grounding.scenes import CROWD, scene

SHALLOW = 4
"""Decoder layers that are trained first."""
_WARM_UP = 50
_RATES = {"matrices": 4.0, "words read": 3.0, "words written": 3.0, "others": 1.0}
"""Learning rates of kinds of parameters, as multiples of a recipe's."""
_SAVE_EVERY = 100
_SHOW_EVERY = 20


@dataclass(frozen=True)
class Recipe:
    """How a phase is trained.

    Attributes:
        steps: optimizer steps.
        batch: pictures in each.
        rate: the highest learning rate, after warming up.
        decay: whether a cosine takes the rate to 0.
    """

    steps: int
    batch: int
    rate: float
    decay: bool = True

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        if step < _WARM_UP:
            return self.rate * (step + 1) / _WARM_UP
        if not self.decay:
            return self.rate
        progress = (step - _WARM_UP) / max(1, self.steps - _WARM_UP)
        return self.rate * (0.5 + 0.5 * math.cos(math.pi * progress))


class Phase:
    """A phase of training with its optimizers, that can be saved and taken up again.

    Attributes:
        name: of the phase.
        recipe: how it is trained.
        batches: from a step to the batches from there on.
        loss: from a batch to the loss, and to a text about it.
        step: optimizer steps done.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        model: nn.Module,
        modules: Sequence[nn.Module],
        batches: Callable[[int], Iterable[Any]],
        loss: Callable[[Any], tuple[Tensor, Callable[[], str]]],
    ) -> None:
        self.name, self.recipe, self.batches, self.loss, self.step = name, recipe, batches, loss, 0
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizers = _optimizers(model, self.parameters)

    def train(self, batch: Any) -> Callable[[], str]:
        """Take a step; what can be said about it."""
        rate = self.recipe.rate_at(self.step)
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


def _optimizers(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of layers, AdamW for all else; matrices and words take larger steps."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in _RATES}
    for parameter in parameters:
        name = names.get(id(parameter), "")
        if parameter.ndim == 2 and ".layers." in name:
            groups["matrices"].append(parameter)
        elif "embed_tokens" in name or "lm_head" in name:
            groups["words read" if "embed" in name else "words written"].append(parameter)
        else:
            groups["others"].append(parameter)
    made = {kind: {"params": given, "times": _RATES[kind]} for kind, given in groups.items() if given}
    matrices = made.pop("matrices", None)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(made.values(), betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if matrices:
        optimizers.insert(0, torch.optim.Muon([matrices], weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
    return optimizers


class Run:
    """A run's modules and phases, and their state in its folder."""

    def __init__(self, folder: Path, modules: dict[str, nn.Module], progress: Progress) -> None:
        self.place, self.modules, self.progress = folder / "state.pt", modules, progress
        self.phases: dict[str, Any] = {}
        if self.place.exists():
            state = torch.load(self.place)
            self.phases = state["phases"]
            for name, module in modules.items():
                module.load_state_dict(state[name])

    def train(self, phase: Phase) -> None:
        """Train to the phase's last step, saving now and then."""
        if phase.name in self.phases:
            phase.take_up(self.phases[phase.name])
        task = self.progress.add_task(
            phase.name, total=phase.recipe.steps, completed=phase.step, shown="starting"
        )
        for batch in phase.batches(phase.step):
            shown = phase.train(batch)
            self.progress.update(task, completed=phase.step)
            if phase.step % _SHOW_EVERY == 0:
                self._show(task, phase, shown())
            if phase.step % _SAVE_EVERY == 0 or phase.step == phase.recipe.steps:
                self._save(phase)

    def _show(self, task: Any, phase: Phase, shown: str) -> None:
        self.progress.update(task, shown=shown)
        if not self.progress.console.is_terminal:
            print(f"{time.strftime('%H:%M:%S')} {phase.name} {phase.step}: {shown}", flush=True)

    def _save(self, phase: Phase) -> None:
        self.phases[phase.name] = phase.state()
        state = {name: module.state_dict() for name, module in self.modules.items()}
        torch.save(state | {"phases": self.phases}, f"{self.place}.new")
        Path(f"{self.place}.new").replace(self.place)


class _TowerBatches(Dataset[Any]):
    """The batches of each step from `start` on."""

    def __init__(self, maker: LessonMaker, recipe: Recipe, start: int) -> None:
        self.maker, self.recipe, self.start = maker, recipe, start

    def __len__(self) -> int:
        return self.recipe.steps - self.start

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        first = (self.start + index) * self.recipe.batch
        scenes = [scene("train", first + i) for i in range(self.recipe.batch)]
        return self.maker.pixels(scenes), self.maker.labels(scenes)


def tower_phase(model: Any, heads: TowerHeads, recipe: Recipe, maker: LessonMaker) -> Phase:
    def loss(batch: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, Callable[[], str]]:
        pixels, labels = batch
        losses = heads(*tower_features(model, pixels), labels)
        return sum(losses.values()), lambda: " ".join(f"{name} {value:.3f}" for name, value in losses.items())

    def batches(start: int) -> DataLoader[Any]:
        return DataLoader(
            _TowerBatches(maker, recipe, start), batch_size=None, num_workers=1, prefetch_factor=4
        )

    return Phase("tower", recipe, model, [model.model.vision_tower, heads], batches, loss)


def align_phase(model: Any, tokenizer: Any, recipe: Recipe, lessons: Lessons) -> Phase:
    """The projector learns to say of each patch, in the decoder's words, what the tower was trained to say."""
    target = _Described(model, tokenizer)

    def batches(start: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for chosen in lessons.batches(recipe.batch, start, recipe.steps, seed=0):
            labels = {name: value[chosen] for name, value in lessons.labels.items()}
            yield lessons.features[chosen].float(), labels

    def loss(batch: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, Callable[[], str]]:
        features, labels = batch
        wanted = target(labels)
        on = labels["size"] != NOTHING
        error = F.mse_loss(model.model.multi_modal_projector(features).float(), wanted) / wanted[on].var()
        return error, lambda: f"error {error:.4f}"

    return Phase("align", recipe, model, [model.model.multi_modal_projector], batches, loss)


class _Described:
    """What patches are said to be: the words of their thing and the four numbers of its box, each in directions of its
    own, so that a head of the decoder can read one of them and nothing else.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        words = model.get_input_embeddings().weight.detach().clone()
        self.waves = words.norm(dim=1).mean() * number_waves()  # [101, 24]
        random = torch.Generator().manual_seed(0)
        directions, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=random))
        sizes = [self.waves.shape[1]] * 4
        *self.sides, rest = directions.split([*sizes, WIDTH - sum(sizes)], dim=1)
        onto_rest = rest @ rest.T * (WIDTH / rest.shape[1]) ** 0.5
        self.words = {
            field: words[tokenizer.convert_tokens_to_ids([f" {word}" for word in each])] @ onto_rest
            for field, each in FIELDS.items()
        }

    def __call__(self, labels: dict[str, Tensor]) -> Tensor:
        """`[B, N, d]` from `tower_labels`; zeros for patches on nothing."""
        on = labels["size"] != NOTHING
        sums = sum(words[labels[field][on]] for field, words in self.words.items())
        box = (labels["box"][on] * 100).round().long()
        sums += sum(self.waves[side] @ place.T for side, place in zip(box.T, self.sides, strict=True))
        described = torch.zeros(*on.shape, WIDTH)
        described[on] = sums
        return described


def decoder_logits(model: Any, batch: Packed) -> Tensor:
    """Logits `[answer tokens, V]` where `batch.labels` has a label."""
    text = model.model.language_model
    embeds = text.embed_tokens(batch.input_ids)
    pictures = model.model.multi_modal_projector(batch.features).to(embeds.dtype)
    embeds = embeds.masked_scatter((batch.input_ids == model.config.image_token_id)[..., None], pictures)
    hidden = text(
        inputs_embeds=embeds,
        position_ids=batch.position_ids,
        packed_lengths=(batch.prefix, batch.length),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[batch.labels != IGNORED])


def decoder_phase(
    name: str, model: Any, tokenizer: Any, recipe: Recipe, lessons: Lessons, seed: int
) -> Phase:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    is_number = torch.tensor(["." in token and len(token) > 2 for token in tokens])
    is_word = torch.tensor([token in (" yes", " no") for token in tokens])

    def batches(start: int) -> Iterator[Packed]:
        return map(lessons.pack, lessons.batches(recipe.batch, start, recipe.steps, seed))

    def loss(batch: Packed) -> tuple[Tensor, Callable[[], str]]:
        logits = decoder_logits(model, batch).float()
        labels = batch.labels[batch.labels != IGNORED]
        each = F.cross_entropy(logits, labels, reduction="none")
        numbers, words = is_number[labels], is_word[labels]

        def shown() -> str:
            right = (logits.argmax(-1) == labels).float()
            return (
                f"numbers {each[numbers].mean():.3f} right {right[numbers].mean():.3f} "
                f"yes/no {each[words].mean():.3f} right {right[words].mean():.3f}"
            )

        weights = 1.0 + 3 * words
        return (each * weights).sum() / weights.sum(), shown

    modules = [model.model.language_model, model.lm_head]
    return Phase(name, recipe, model, modules, batches, loss)


def main(
    folder: Annotated[
        Path, typer.Argument(help="Where the state of the run and the trained model are written.")
    ],
    tower_steps: int = 2400,
    slower_steps: int = 800,
    deep_steps: int = 1300,
    scenes: int = 14000,
    rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train, and write the model in bfloat16 with its processor to FOLDER/model."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    model, tokenizer = build_model(processor, seed), processor.tokenizer
    text = model.model.language_model
    text.config._attn_implementation = PACKED
    for layer in text.layers:
        layer.compile(dynamic=False)
    maker, heads = LessonMaker(processor), TowerHeads()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[shown]}")) as progress:
        run = Run(folder, {"model": model, "heads": heads}, progress)
        run.train(tower_phase(model, heads, Recipe(tower_steps, 32, rate), maker))
        model.model.vision_tower.requires_grad_(False)

        def learn(name: str, first: int, count: int, crowd: tuple[int, int]) -> Lessons:
            return kept_lessons(folder / f"{name}.pt", model, maker, first, count, crowd, progress)

        one = learn("one", 10**6, scenes // 8, (1, 1))
        few = learn("few", 2 * 10**6, scenes // 4, (1, 3))
        full = learn("full", 3 * 10**6, scenes, CROWD)
        run.train(align_phase(model, tokenizer, Recipe(1500, 64, 3 * rate), full))
        model.model.multi_modal_projector.requires_grad_(False)
        text.config.num_hidden_layers = SHALLOW
        shallow = (
            ("one", one, Recipe(200, 16, rate, decay=False)),
            ("few", few, Recipe(400, 16, rate, decay=False)),
            ("full", full, Recipe(1000, 16, rate, decay=False)),
            ("slower", full, Recipe(slower_steps, 16, 0.4 * rate, decay=False)),
        )
        for name, lessons, recipe in shallow:
            run.train(decoder_phase(name, model, tokenizer, recipe, lessons, seed))
        text.config.num_hidden_layers = DECODER_LAYERS
        if "deep" not in run.phases:
            grow(model, SHALLOW)
        run.train(decoder_phase("deep", model, tokenizer, Recipe(deep_steps, 16, 0.4 * rate), full, seed + 1))
    text.config._attn_implementation = "sdpa"
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


if __name__ == "__main__":
    typer.run(main)
