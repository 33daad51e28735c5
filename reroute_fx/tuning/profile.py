"""Where a model looks: what each layer and head attends to, and what its answers depend on."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console, Group, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..capture import text_decoder
from ..capture.wrappers import unwrap
from ..common.json_files import write_json
from ..common.tables import as_text
from ..common.turns import one_at_a_time
from ..config.config_files import from_file
from ..errors import ConfigError, InputError, UnsupportedModelError
from ..kernels import keep_count
from ..methods.tiers import tier_share
from ..runtime import RoutedModel
from .profile_file import PER_HEAD, SavedProfile
from .proposals import SHARES, Proposal, propose
from .read_prompts import Pair, hash_prompts, read_prompts
from .watched_model import Observation, WatchedModel

_TARGETS = 1 / 24
"""Share of the visual tokens that count as what an answer depends on: 6 of 144, 24 of 576."""
_LISTED = 8
"""Layers in the table of `str`."""

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Profile:
    """Where an unrouted model looks; ``str(profile)`` is a table.

    Arrays are ``[layers, heads]``, float64, means over prompts.

    Attributes:
        model: its class.
        share: of the visual tokens that the tier keeps.
        visual_tokens: of each prompt.
        prompts_hash: SHA-256 of the prompts.
        versions: of torch and transformers.
        seconds: that it took.
        attention: share of the last token's attention that goes to visual tokens.
        text_attention: the same, mean over all text behind the last picture.
        entropy: of the last token's attention among the visual tokens, over its maximum ``log N``: 0 for a single
            token, 1 if all are alike.
        lost: share of the last token's ``attention * |value|``, summed over all tokens, that goes with the visual
            tokens outside of the tier's share with the largest mean attention of the layer's heads.
        recall: share of the `targets` among the tier's share with the largest attention of the last token. Chance finds
            `share`. None without gradients, as all that follow.
        text_recall: the same with attention averaged over all text behind the last picture.
        effect: first-order change of the answer's log-probability if a head took nothing from the pictures, as a share
            of all heads' together: where pictures are read. Contributions of tokens are added as absolute values.
        recall_curves: recall for each of `SHARES` instead of the tier's, by attention of the ``"last"`` token and of
            all ``"text"``, ``[layers, heads + 1, shares]``; the last of the heads is the mean of all.
        targets: for each prompt the visual tokens on which the answer depends, the first first: the one in 24 with
            the largest ``|d log p(answer) / d e| * |e|``, where `answer` is the model's own greedy one and `e` what
            enters the decoder.
        attended: for each prompt and layer as many tokens, those with the largest mean attention of the last token.
    """

    model: str
    share: float
    visual_tokens: tuple[int, ...]
    prompts_hash: str
    versions: Mapping[str, str]
    seconds: float
    attention: Array
    text_attention: Array
    entropy: Array
    lost: Array
    recall: Array | None
    text_recall: Array | None
    effect: Array | None
    recall_curves: Mapping[str, Array] | None
    targets: tuple[tuple[int, ...], ...] | None
    attended: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    def proposals(self, tier: float | None = None, num: int | None = None) -> list[Proposal]:
        """Configurations to try first, the most promising one first.

        Args:
            tier: see `RoutingConfig.from_tier`; None for that of the profile.
            num: of them at most.

        Raises:
            ConfigError: the profile has no gradients, or the decoder can't keep the tier.
        """
        if self.effect is None or self.recall_curves is None:
            raise ConfigError(
                "The profile was taken without gradients; expected one with them, which say what answers depend on. "
                "Profile with gradient=True."
            )
        share = self.share if tier is None else tier_share(tier)
        return propose(self.effect.sum(axis=1), self.recall_curves, share)[:num]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dictionaries; None for what is not there."""
        return {"shares": list(SHARES)} | {
            field.name: _plain(getattr(self, field.name)) for field in fields(self)
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON, whole or not at all.

        Raises:
            InputError: the folder doesn't exist, or `path` is one.
        """
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read what `save` wrote.

        Raises:
            ConfigError: naming the file, and the first field that is missing, unknown or wrong.
        """
        saved = from_file(SavedProfile, path)
        given = {field.name: getattr(saved, field.name) for field in fields(cls)}
        for name in PER_HEAD:
            given[name] = _array(given[name])
        if saved.recall_curves is not None:
            given["recall_curves"] = {name: _array(curves) for name, curves in saved.recall_curves.items()}
        return cls(**given)

    def plot(self, path: str | Path) -> None:
        """Draw the arrays as heat, layers by heads, in one picture.

        Args:
            path: the suffix says the format: .png, .svg, .pdf.

        Raises:
            BackendUnavailableError: matplotlib is missing.
            InputError: no such folder or format.
        """
        from .profile_plot import plot_profile

        plot_profile(self, path)

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        low, high = min(self.visual_tokens), max(self.visual_tokens)
        tokens = str(low) if low == high else f"{low} to {high}"
        prompts = f"{len(self.visual_tokens)} prompts with {tokens} visual tokens"
        title = f"{self.model}: {prompts}, {100 * self.share:.1f} % kept"
        lines = ["Attention, entropy and loss are those of the last token, means over heads."]
        if self.effect is not None:
            lines.append(
                f"Effect is a layer's share of what answers take from pictures; layers with less are left out. Recall "
                f"is that of the tokens on which answers depend; chance has {self.share:.2f}."
            )
        return Group(Text(title, style="bold"), self._table(), Text("\n".join(lines)))

    def _table(self) -> Table:
        """The layers in which most is read, or without gradients all."""
        headings = ["layer", "attention", "entropy", "lost"]
        order: Sequence[int] = range(self.num_layers)
        if self.effect is not None:
            headings += ["effect", "recall", "by text", "best head"]
            order = np.argsort(-self.effect.sum(axis=1), kind="stable")[:_LISTED].tolist()
        table = Table(box=None, padding=(0, 1, 0, 0))
        for heading in headings:
            table.add_column(heading, justify="right")
        for layer in sorted(order):
            means = [array[layer].mean() for array in (self.attention, self.entropy, self.lost)]
            table.add_row(str(layer), *(f"{mean:.2f}" for mean in means), *self._recall_cells(layer))
        return table

    def _recall_cells(self, layer: int) -> list[str]:
        if self.effect is None or self.recall is None or self.recall_curves is None:
            return []
        both = [np.interp(self.share, SHARES, self.recall_curves[by][layer, -1]) for by in ("last", "text")]
        head = int(self.recall[layer].argmax())
        values = f"{self.effect[layer].sum():.2f}", *(f"{value:.2f}" for value in both)
        return [*values, f"{head}: {self.recall[layer, head]:.2f}"]


@one_at_a_time
def profile(
    model: torch.nn.Module,
    prompts: Sequence[Mapping[str, Any] | Pair],
    *,
    processor: Any = None,
    tier: float = 128,
    max_new_tokens: int = 32,
    batch_size: int = 1,
    gradient: bool = True,
    progress: bool = False,
) -> Profile:
    """See where a model looks when it answers: without labels, without routing.

    Each prompt is answered greedily; then prompt and answer run once more, forwards and, for what the answer depends
    on, backwards. Of attention only the rows of text behind the pictures are computed; the backward pass keeps the
    activations of one batch. The model is left as it is: a copy on its weights runs.

    Args:
        model: a Hugging Face vision-language model that `compile` takes, on one device. It runs in eval mode.
        prompts: what the processor returned, for one prompt or several each, padded in front; or (picture or path,
            question) pairs. At least 8; a few dozen say more.
        processor: the model's, for pairs.
        tier: see `compile`: how many tokens stay when recall and loss are counted.
        max_new_tokens: longest answer.
        batch_size: prompts that run together, of those that came as pairs.
        gradient: whether to ask what answers depend on. False for models through which no gradients pass; then there
            are no recalls and no proposals.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: a routed model, or a tier, length or size that is none.
        InputError: too few prompts, or one that can't be routed.
        UnsupportedModelError: a model whose attention can't be watched, or whose gradients don't reach the pictures.
    """
    share = tier_share(tier)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} is {value!r}; expected a Python int of 1 or more.")
    model, _ = unwrap(model)
    decoder = text_decoder(model)
    if isinstance(model, RoutedModel):
        raise ConfigError("model is routed already; expected the original model. Profile that one.")
    if decoder.device.type == "meta":
        raise UnsupportedModelError(
            "model is on the meta device and has no weights; expected a loaded model."
        )
    batches = read_prompts(model, prompts, processor, rows=batch_size)
    if any(batch.get("position_ids") is not None for batch in batches):
        raise InputError("prompts hold position_ids; expected none, as processors return. Leave them out.")
    start = time.perf_counter()
    watched = WatchedModel(model)
    shown = track(batches, "profiling", console=Console(stderr=True)) if progress else batches
    # Maps of attention are large: each prompt's are counted before the next one runs.
    counted = [
        _count(seen, share) for batch in shown for seen in watched.observe(batch, max_new_tokens, gradient)
    ]
    return Profile(
        model=type(model).__name__,
        share=share,
        visual_tokens=tuple(one.visual_tokens for one in counted),
        prompts_hash=hash_prompts(batches),
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        seconds=time.perf_counter() - start,
        **_means([one.arrays for one in counted]),
        targets=tuple(one.targets for one in counted) if gradient else None,
        attended=tuple(one.attended for one in counted),
    )


@dataclass(frozen=True)
class _Counted:
    """What is counted of one prompt, as in `Profile`; curves are in `arrays` too, by their queries."""

    visual_tokens: int
    arrays: Mapping[str, Array]
    targets: tuple[int, ...]
    attended: tuple[tuple[int, ...], ...]


def _count(seen: Observation, share: float) -> _Counted:
    arrays = {name: statistic(seen, share) for name, statistic in _STATISTICS.items()}
    targets: tuple[int, ...] = ()
    if seen.effect is not None:
        arrays["effect"] = seen.effect / seen.effect.sum()
        for name, queries in (("recall", "last"), ("text_recall", "text")):
            arrays[name] = _recall(seen, queries, [share])[:, :-1, 0]
            arrays[queries] = _recall(seen, queries, SHARES)
        targets = tuple(target_tokens(seen).tolist())
    small = {name: array.double().cpu().numpy() for name, array in arrays.items()}
    return _Counted(seen.last.shape[-1], small, targets, _attended(seen))


def _means(arrays: Sequence[Mapping[str, Array]]) -> dict[str, Any]:
    """The arrays of a `Profile` by name, its curves among them: means over prompts."""
    means: dict[str, Any] = {name: np.mean([one[name] for one in arrays], axis=0) for name in arrays[0]}
    if "effect" not in means:
        return means | dict.fromkeys(("recall", "text_recall", "effect", "recall_curves"))
    curves = {queries: means.pop(queries) for queries in ("last", "text")}
    return means | {"recall_curves": curves}


def _entropy(seen: Observation, share: float) -> Tensor:
    among = seen.last / seen.last.sum(dim=-1, keepdim=True)
    most = math.log(among.shape[-1]) if among.shape[-1] > 1 else 1.0
    entropy: Tensor = torch.special.entr(among).sum(dim=-1)
    return entropy / most


def _lost(seen: Observation, share: float) -> Tensor:
    ranked = _ranked(seen.last.mean(dim=1))  # [L, N]
    gone = ranked[:, keep_count(ranked.shape[-1], share) :]
    return seen.read.gather(2, gone[:, None].expand(-1, seen.read.shape[1], -1)).sum(dim=-1)


_STATISTICS: dict[str, Callable[[Observation, float], Tensor]] = {
    "attention": lambda seen, share: seen.last.sum(dim=-1),
    "text_attention": lambda seen, share: seen.text.sum(dim=-1),
    "entropy": _entropy,
    "lost": _lost,
}
"""From a prompt and the tier's share to ``[L, H]``."""


def _recall(seen: Observation, queries: str, shares: Sequence[float]) -> Tensor:
    """Share of the targets among the first tokens of a ranking by each head and by their mean.

    Returns:
        ``[L, H + 1, shares]``.
    """
    attention = getattr(seen, queries)
    attention = torch.cat([attention, attention.mean(dim=1, keepdim=True)], dim=1)
    places = _ranked(attention).argsort(dim=-1)[..., target_tokens(seen)]  # [L, H + 1, targets]
    counts = [keep_count(attention.shape[-1], share) for share in shares]
    return torch.stack([(places < count).double().mean(dim=-1) for count in counts], dim=-1)


def _ranked(scores: Tensor) -> Tensor:
    """Tokens from the largest score to the smallest; of equal ones the lower goes first, as in routing."""
    return scores.argsort(dim=-1, descending=True, stable=True)


def _target_count(seen: Observation) -> int:
    return max(1, round(_TARGETS * seen.last.shape[-1]))


def target_tokens(seen: Observation) -> Tensor:
    """The visual tokens on which a prompt's answer depends: see `Profile.targets`."""
    assert seen.saliency is not None
    return _ranked(seen.saliency)[: _target_count(seen)]


def _attended(seen: Observation) -> tuple[tuple[int, ...], ...]:
    first = _ranked(seen.last.mean(dim=1))[:, : _target_count(seen)]
    return tuple(map(tuple, first.tolist()))


def _array(numbers: Any) -> Array | None:
    return None if numbers is None else np.array(numbers, dtype=np.float64)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return value
