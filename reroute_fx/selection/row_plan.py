"""How many tokens of each row run through each stage: known from the prompt before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..common.packed_copies import copy_together
from ..config.routing_config import RoutingConfig
from ..errors import InputError
from ..passes.tensor_names import ALWAYS, LENGTHS, POOLS, VISUAL_INDEX, keep_input, slots_input


@dataclass(frozen=True)
class RowPlan:
    """Counts of a batch of prompts and the inputs of a routed program that carry them.

    Attributes:
        lengths: tokens of each row.
        images: for each row the visual tokens of each of its images.
        stage_lengths: for each decision layer the tokens of each row that run through its stage.
        stage_tokens: the same on the device, ``[B]`` int64, for each first layer of a stage; layer 0 runs on all.
        inputs: ``visual_index``, ``lengths``, ``pools``, ``keep_<layer>`` and ``slots_<layer>`` as `InsertSelection`
            describes them, and what else was given for rules that ask for it.
    """

    lengths: tuple[int, ...]
    images: tuple[tuple[int, ...], ...]
    stage_lengths: dict[int, tuple[int, ...]]
    stage_tokens: dict[int, torch.Tensor]
    inputs: dict[str, torch.Tensor]

    def layer_lengths(self, num_layers: int) -> list[tuple[int, ...]]:
        """For each layer the tokens of each row that run through it."""
        current, layers = self.lengths, []
        for layer in range(num_layers):
            current = self.stage_lengths.get(layer, current)
            layers.append(current)
        return layers

    def slots(self, layer: int, places: int) -> int:
        """Places of the stream that a layer runs on, of `places` in the prompt."""
        stages = [start for start in self.stage_lengths if start <= layer]
        return max(self.stage_lengths[stages[-1]]) if stages else places


def plan_rows(
    config: RoutingConfig,
    is_visual: torch.Tensor,
    lengths: Sequence[int],
    images: Sequence[Sequence[int]],
    asked: Mapping[str, torch.Tensor] = MappingProxyType({}),
    device: torch.device | None = None,
) -> RowPlan:
    """Plan a batch, on the host. What programs take goes to their device in one copy, before they are launched.

    Args:
        config: what is routed.
        is_visual: which places hold a visual token, ``[B, S]`` bool; rows start with their first token and are
            padded at the end.
        lengths: tokens of each row.
        images: for each row the visual tokens of each of its images, in order.
        asked: inputs that the program takes because rules ask for them: `text_index`, ``rows``, ``columns``,
            ``images``; see `Candidates`. With blocks what `pooled_inputs` returns.
        device: of the program, with `is_visual` on the host; None for that of `is_visual`.
    """
    if device is None:
        device, is_visual = is_visual.device, is_visual.cpu()
    batch, places = is_visual.shape
    pools = images if config.pool == "image" else [[sum(row)] for row in images]
    widest = max(1, *(sum(row) for row in images))
    position = torch.arange(places).expand(batch, places)
    visual_index = position.masked_fill(~is_visual, places).sort(dim=1).values[:, :widest]
    inputs = {VISUAL_INDEX: visual_index, LENGTHS: torch.tensor(lengths), **asked}
    if config.pool == "image":
        inputs[POOLS] = torch.tensor([_pool_numbers(row, widest) for row in pools])
    stage_lengths = {}
    for decision, layer in enumerate(config.decision_layers):
        _refuse_small_pools(config, decision, pools)
        if config.keep_tokens and decision < config.block_decisions:
            _refuse_many_blocks(config, decision, pools, asked[ALWAYS])
        kept = [[config.keep_count(decision, tokens) for tokens in row] for row in pools]
        inputs[keep_input(layer)] = torch.tensor(
            [_places(p, k, widest) for p, k in zip(pools, kept, strict=True)]
        )
        rows = zip(lengths, images, kept, strict=True)
        stage_lengths[layer] = tuple(length - sum(image) + sum(k) for length, image, k in rows)
        inputs[slots_input(layer)] = torch.zeros(max(stage_lengths[layer]), dtype=torch.bool)
    stage_tokens = {layer: torch.tensor(rows) for layer, rows in stage_lengths.items()}
    # A copy behind the launch of the program would wait for its end.
    moved = copy_together({**inputs, **stage_tokens}, device)
    inputs = {name: moved[name] for name in inputs}
    stage_tokens = {0: inputs[LENGTHS], **{layer: moved[layer] for layer in stage_tokens}}
    return RowPlan(tuple(lengths), tuple(map(tuple, images)), stage_lengths, stage_tokens, inputs)


def _refuse_small_pools(config: RoutingConfig, decision: int, pools: Sequence[Sequence[int]]) -> None:
    for row, sizes in enumerate(pools):
        too_small = [tokens for tokens in sizes if tokens < config.keep_count(decision, tokens)]
        if too_small:
            raise InputError(
                f"Row {row} has a pool of {too_small[0]} visual tokens, but keep_tokens is {list(config.keep_tokens)}; "
                f"expected at least {config.keep_count(decision, 1)}. Pass a larger image or use keep_ratios."
            )


def _refuse_many_blocks(
    config: RoutingConfig, decision: int, pools: Sequence[Sequence[int]], always: torch.Tensor
) -> None:
    for row, sizes in enumerate(pools):
        marks = always[row, : sum(sizes)].split(list(sizes))
        most = max((int(of_pool.sum()) for of_pool in marks), default=0)
        if most > config.keep_tokens[decision]:
            raise InputError(
                f"Row {row} has a pool with {most} blocks of {config.block} x {config.block} visual tokens, but "
                f"keep_tokens is {list(config.keep_tokens)}; expected at least {most} for the first "
                f"{config.block_decisions}. Pass a smaller image, or use keep_ratios or larger blocks."
            )


def _pool_numbers(pools: Sequence[int], width: int) -> list[int]:
    """The pool of each visual token; what is no token comes last."""
    numbers = [number for number, tokens in enumerate(pools) for _ in range(tokens)]
    return numbers + [len(pools)] * (width - len(numbers))


def _places(pools: Sequence[int], kept: Sequence[int], width: int) -> list[bool]:
    """Which places of the ranking are kept: the first ones of each pool."""
    places = [place < k for tokens, k in zip(pools, kept, strict=True) for place in range(tokens)]
    return places + [False] * (width - len(places))
