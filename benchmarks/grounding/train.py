"""Train the small LLaVA of the grounding study from scratch.

    python benchmarks/grounding/train.py tower runs/tower
    python benchmarks/grounding/train.py decoder runs/small --tower runs/tower --layers 16 --seed 1

First a tower, which any number of decoders share: each patch says which thing it lies on and where that thing's box is;
its heads are thrown away. What it sees of many scenes is kept beside it.

Then a decoder, all of whose layers are trained from the first step on; `--grown` trains four, spreads them over the
depth and trains on, which costs less. It is at first told what the tower ought to say of each patch, in its own words
and numbers, about a few things, which takes no tower yet, then about as many as there are in the test. Then the
projector learns to say it, from what the frozen tower sees, and projector and decoder learn on from that, as in
LLaVA-1.5.

A run that was stopped goes on where it saved its state when it is started again with the same words. `keep` writes a
state small enough for a repository: put back as `state.pt` in a run's folder, it goes on with fresh optimizers.

    python benchmarks/grounding/train.py tower runs/tower --start reroute_fx/grounding/model --steps 0  # a trained one
    python benchmarks/grounding/train.py keep runs/small unfinished/small.pt
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
from lessons import LessonMaker, Lessons, Told, kept_lessons
from packing import IGNORED, PACKED, Packed, pack
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from small_llava import DECODER_LAYERS, WIDTH, build_model, build_processor, directions, grow, number_waves
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tower import FIELDS, NOTHING, TowerHeads, tower_features
from transformers import LlavaForConditionalGeneration

from reroute_fx.errors import ConfigError
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


@dataclass(frozen=True)
class Weights:
    """How much tokens of answers count.

    Attributes:
        first: the first number of a box, which says what thing is meant; the others follow from it.
        yes_no: yes and no, which stay guesses until things are found.
        others: all others.
    """

    first: float
    yes_no: float
    others: float


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
        if "optimizers" in state:
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
        if phase.name not in self.phases:
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


class Described:
    """What patches are said to be: the words of their thing and the four numbers of its box, each in directions of its
    own, so that a head of the decoder can read one of them and nothing else.

    The words are those of the model as it is built, not as it becomes.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        words = model.get_input_embeddings().weight.detach().clone()
        self.waves = words.norm(dim=1).mean() * number_waves()  # [101, 24]
        self.sides, _ = directions()
        self.words = {
            field: words[tokenizer.convert_tokens_to_ids([f" {word}" for word in each])]
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


def align_phase(model: Any, described: Described, recipe: Recipe, lessons: Lessons) -> Phase:
    """The projector learns to say of each patch, in the decoder's words, what the tower was trained to say."""

    def batches(start: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        for chosen in lessons.batches(recipe.batch, start, recipe.steps, seed=0):
            yield lessons.features[chosen].float(), lessons.labels_of(chosen)

    def loss(batch: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, Callable[[], str]]:
        features, labels = batch
        wanted = described(labels)
        on = labels["size"] != NOTHING
        error = F.mse_loss(model.model.multi_modal_projector(features).float(), wanted) / wanted[on].var()
        return error, lambda: f"error {error:.4f}"

    return Phase("align", recipe, model, [model.model.multi_modal_projector], batches, loss)


def decoder_logits(model: Any, batch: Packed) -> Tensor:
    """Logits `[answer tokens, V]` where `batch.labels` has a label."""
    text = model.model.language_model
    embeds = text.embed_tokens(batch.input_ids)
    is_image = (batch.input_ids == model.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(is_image, batch.pictures.to(embeds.dtype))
    hidden = text(
        inputs_embeds=embeds,
        position_ids=batch.position_ids,
        packed_prefix=batch.prefix,
        packed_mask=batch.mask,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[batch.labels != IGNORED])


def seen(model: Any, recipe: Recipe, lessons: Lessons, seed: int) -> Callable[[int], Iterator[Packed]]:
    """From a step to the batches from there on: scenes as the tower sees and the projector describes them."""
    projector = model.model.multi_modal_projector
    return _in_turn(recipe, lessons, seed, lambda chosen: projector(lessons.features[chosen].float()))


def told(
    described: Described, recipe: Recipe, lessons: Lessons, seed: int
) -> Callable[[int], Iterator[Packed]]:
    """From a step to the batches from there on: the same scenes, described without mistakes."""
    return _in_turn(recipe, lessons, seed, lambda chosen: described(lessons.labels_of(chosen)))


def _in_turn(
    recipe: Recipe, lessons: Lessons, seed: int, pictures: Callable[[Tensor], Tensor]
) -> Callable[[int], Iterator[Packed]]:
    """From a step to the batches from there on, with pictures as the decoder reads them."""

    def batches(start: int) -> Iterator[Packed]:
        for chosen in lessons.batches(recipe.batch, start, recipe.steps, seed):
            yield lessons.pack(chosen, pictures(chosen))

    return batches


def told_of_few(
    described: Described, recipe: Recipe, maker: LessonMaker, first: int, crowd: tuple[int, int]
) -> Callable[[int], Iterator[Packed]]:
    """From a step to the batches from there on: scenes from number `first` on, with few things, described likewise."""

    def batches(start: int) -> Iterator[Packed]:
        scenes = Told(maker, first, crowd, recipe.batch, start, recipe.steps)
        for labels, laid_out in DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=4):
            yield pack(described(labels), maker.prefix, *laid_out)

    return batches


def decoder_phase(
    name: str,
    model: Any,
    tokenizer: Any,
    recipe: Recipe,
    batches: Callable[[int], Iterable[Packed]],
    weights: Weights,
) -> Phase:
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    is_first = torch.tensor([token.startswith(" [") for token in tokens])
    is_word = torch.tensor([token in (" yes", " no") for token in tokens])

    def loss(batch: Packed) -> tuple[Tensor, Callable[[], str]]:
        with torch.autocast("cpu", torch.bfloat16):
            logits = decoder_logits(model, batch).float()
        labels = batch.labels[batch.labels != IGNORED]
        each = F.cross_entropy(logits, labels, reduction="none")
        first, words = is_first[labels], is_word[labels]

        def shown() -> str:
            right = (logits.argmax(-1) == labels).float()
            parts = {"first numbers": first, "yes/no": words, "others": ~(first | words)}
            return " ".join(
                f"{n} {each[at].mean():.3f} right {right[at].mean():.3f}" for n, at in parts.items()
            )

        counts = torch.full_like(each, weights.others)
        counts[first], counts[words] = weights.first, weights.yes_no
        return (each * counts).sum() / counts.sum(), shown

    modules = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    return Phase(name, recipe, model, modules, batches, loss)


def kept_state(state: dict[str, Any]) -> dict[str, Any]:
    """A run's state in bfloat16, without what optimizers remember."""
    modules = {
        name: {key: value.bfloat16() if value.is_floating_point() else value for key, value in module.items()}
        for name, module in state.items()
        if name != "phases"
    }
    return modules | {"phases": {name: {"step": phase["step"]} for name, phase in state["phases"].items()}}


app = typer.Typer(help=__doc__)
Folder = Annotated[Path, typer.Argument(help="where the state of the run and what comes of it are written")]
_LESSONS = "lessons.pt"
_FEW, _FEW_STEPS = (2, 4), 400
"""Fewest and most things of what a decoder is told before it is told of as many as in the test, and for how long."""
_ALIGN_STEPS = 1500
_TOLD, _SEEN = Weights(6.0, 1.0, 0.5), Weights(4.0, 2.0, 1.0)
"""At first all that matters is which thing is meant."""


@app.command()
def tower(
    folder: Folder,
    steps: int = 6000,
    rate: float = 1e-3,
    seed: int = 0,
    scenes: Annotated[int, typer.Option(help="Scenes that decoders learn from.")] = 24000,
    start: Annotated[Path | None, typer.Option(help="Trained model whose tower is trained on.")] = None,
) -> None:
    """Train a tower, and keep what it sees of scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    model, heads, maker = build_model(processor, seed), TowerHeads(), LessonMaker(processor)
    if start is not None:
        trained = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
        model.model.vision_tower.load_state_dict(trained.model.vision_tower.state_dict())
    with _shown_progress() as progress:
        run = Run(folder, {"tower": model.model.vision_tower, "heads": heads}, progress)
        run.train(tower_phase(model, heads, Recipe(steps, 32, rate), maker))
        kept_lessons(folder / _LESSONS, model, maker, 3 * 10**6, scenes, CROWD, progress)


@app.command()
def decoder(
    folder: Folder,
    tower: Annotated[Path, typer.Option(help="Folder of a run that trained a tower.")],
    layers: Annotated[int, typer.Option(min=SHALLOW)] = DECODER_LAYERS,
    grown: Annotated[
        bool, typer.Option(help=f"Train {SHALLOW} layers first and grow to all of them.")
    ] = False,
    told_steps: Annotated[int, typer.Option(help="Steps about scenes that are told.")] = 700,
    seen_steps: Annotated[
        int, typer.Option(help="Steps about scenes that are seen, at the full rate.")
    ] = 650,
    slower_steps: Annotated[int, typer.Option(help="Steps at a rate that falls to 0.")] = 900,
    rate: float = 7e-4,
    seed: int = 0,
) -> None:
    """Train a projector and a decoder for a tower; write the model in bfloat16 with its processor to FOLDER/model."""
    folder.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    model, maker = build_model(processor, seed, layers), LessonMaker(processor)
    tokenizer = processor.tokenizer
    described = Described(model, tokenizer)
    text = model.model.language_model
    text.config._attn_implementation = PACKED
    for layer in text.layers:
        layer.compile(dynamic=False)
    with _shown_progress() as progress:
        run = Run(folder, {"model": model}, progress)
        text.config.num_hidden_layers = SHALLOW if grown else layers
        recipe = Recipe(_FEW_STEPS, 16, rate, decay=False)
        batches = told_of_few(described, recipe, maker, (100 * seed + 1) * 10**6, _FEW)
        run.train(decoder_phase("few", model, tokenizer, recipe, batches, _TOLD))
        lessons = take_tower(model, tower)
        recipe = Recipe(told_steps, 16, rate, decay=False)
        batches = told(described, recipe, lessons, seed)
        run.train(decoder_phase("told", model, tokenizer, recipe, batches, _TOLD))
        run.train(align_phase(model, described, Recipe(_ALIGN_STEPS, 64, 3 * rate), lessons))
        for name, recipe in (
            ("seen", Recipe(seen_steps, 16, rate, decay=False)),
            ("slower", Recipe(slower_steps, 16, 0.5 * rate)),
        ):
            if name == "slower" and grown:
                text.config.num_hidden_layers = layers
                if name not in run.phases:
                    grow(model, SHALLOW)
            batches = seen(model, recipe, lessons, seed)
            run.train(decoder_phase(name, model, tokenizer, recipe, batches, _SEEN))
    write_model(model, processor, folder / "model")


@app.command()
def keep(
    folder: Folder, file: Annotated[Path, typer.Argument(help="where the smaller state is written")]
) -> None:
    """Write what a run has learnt so far, without what its optimizers remember."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(kept_state(torch.load(folder / "state.pt")), file)


def take_tower(model: Any, folder: Path) -> Lessons:
    """Let the model have the tower of a run; what it sees.

    Raises:
        ConfigError: it isn't trained, or has seen nothing yet.
    """
    if not (folder / _LESSONS).exists():
        raise ConfigError(
            f"tower is {str(folder)!r}, which has no {_LESSONS}; expected a folder of `train.py tower`, run to its end."
        )
    model.model.vision_tower.load_state_dict(torch.load(folder / "state.pt")["tower"])
    model.model.vision_tower.requires_grad_(False)
    return Lessons(**torch.load(folder / _LESSONS, mmap=True))


def write_model(model: Any, processor: Any, folder: Path) -> None:
    model.model.language_model.config._attn_implementation = "sdpa"
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _shown_progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[shown]}"))


if __name__ == "__main__":
    app()
