"""Conversations that decode together, on caches of fixed memory in whose rows prompts come and go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

from ..common.turns import one_at_a_time
from ..errors import ConfigError, InputError, UnsupportedModelError
from ..passes.tensor_names import index_cache_input
from .cache import CachedRows, RoutedCache
from .call_checks import cache_sizes, check_owner, check_plain_cache, check_tensors, latent_width
from .routed_model import RoutedModel

LEAST_CAPACITY = 64
"""Places of a row in each stage at first. They are doubled, so that few CUDA graphs serve all lengths."""


@dataclass(frozen=True, eq=False)
class Slot:
    """Rows of a pool that a conversation holds from `SlotPool.claim` to `SlotPool.release`."""

    rows: tuple[int, ...]


class SlotPool:
    """Caches for a fixed number of rows, on which conversations that start and end at different times decode together.

    A prompt is run alone, or in a batch, and its keys and values are written into the rows of a slot; `step` then feeds
    one token to each row that takes part. Rows know nothing of each other: each computes what it computes alone.

    The memory is allocated at once and stays. In it a stage has as many places as its longest row needs, doubled when
    it needs more, and a step runs on the rows up to the last that takes part, doubled from one: a CUDA graph for each
    number of places and of rows serves all conversations.

    >>> pool = SlotPool(routed, rows=8, capacity=1024)  # doctest: +SKIP
    >>> slot = pool.claim()  # doctest: +SKIP
    >>> pool.write(slot, routed(**inputs))  # doctest: +SKIP

    Args:
        model: from `reroute_fx.compile` or `reroute_fx.load`.
        rows: that can be held.
        capacity: tokens of a row, prompt and answer, of which the last one is never cached.
        visual_tokens: that every prompt has at least. Later stages keep few of them, and get so many places less: a
            prompt with fewer has to be shorter.

    Attributes:
        rows: that can be held.
        capacity: of a row.
        bytes: of all keys and values, whoever holds them.

    Raises:
        ConfigError: a number that is no whole number above 0, or beyond the limits of an artifact.
        UnsupportedModelError: layers with windows or chunks, whose caches hold which token each place has, with a
            state, with the cache of an earlier layer, or with latent keys and values.
    """

    def __init__(self, model: RoutedModel, rows: int, capacity: int, visual_tokens: int = 0) -> None:
        _check_numbers(model, rows, capacity, visual_tokens)
        _refuse_other_layers(model)
        self.rows, self.capacity, self._visual_tokens = rows, capacity, visual_tokens
        self._model, config = model, model.routing_config
        layers, heads, width = cache_sizes(model.config)
        starts = (0, *config.decision_layers)
        self._stages = dict(zip(starts, zip(starts, (*starts[1:], layers), strict=True), strict=True))
        visual = config.tokens_per_layer(layers, visual_tokens) if visual_tokens else (0,) * layers
        self._most = {start: capacity - visual_tokens + visual[start] for start in starts}
        self._shape = heads, width
        self._slots: list[Slot | None] = [None] * rows
        self._lengths = {start: [0] * rows for start in starts}
        # Not of inference mode, in which steps may run or not.
        with torch.inference_mode(False):
            self._memory = [
                tuple(self._zeros(rows * heads * self._most[start] * width, model.dtype) for _ in range(2))
                for start, (first, end) in self._stages.items()
                for _ in range(first, end)
            ]
            self._tokens = {start: self._zeros(rows, torch.int64) for start in starts}
            self._next_position, self._gone = (self._zeros(rows, torch.int64) for _ in range(2))
            self._active = self._zeros(rows, torch.int64)
        self._takes_part = [False] * rows
        self._places = {start: _doubled(1, most) for start, most in self._most.items()}
        self._cache, self._cached_rows = _StepCache(), 0

    def _zeros(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype, device=self._model.device)

    @property
    def bytes(self) -> int:
        return sum(states.nbytes for pair in self._memory for states in pair)

    @property
    def free(self) -> int:
        """Rows that nobody holds."""
        return self._slots.count(None)

    def lengths(self, slot: Slot) -> tuple[dict[int, int], ...]:
        """For each row of a slot the tokens that it has in each stage, by the stage's first layer; 0 before `write`."""
        self._check_held(slot)
        return tuple({start: held[row] for start, held in self._lengths.items()} for row in slot.rows)

    @one_at_a_time
    def claim(self, rows: int = 1) -> Slot:
        """Take rows, the first ones that are free.

        Raises:
            InputError: there are not as many.
        """
        free = [row for row, slot in enumerate(self._slots) if slot is None]
        if not 1 <= rows <= len(free):
            raise InputError(
                f"{rows} rows were asked for, but {len(free)} of the pool's {self.rows} are free; expected 1 to "
                f"{len(free)}. Release a slot, or make a larger pool."
            )
        slot = Slot(tuple(free[:rows]))
        for row in slot.rows:
            self._slots[row] = slot
        return slot

    @one_at_a_time
    def release(self, slot: Slot) -> None:
        """Give the rows of a slot back. Their places are free at once; nothing of them is read again.

        Raises:
            InputError: the slot was released already, or is of another pool.
        """
        self._check_held(slot)
        for row in slot.rows:
            self._slots[row] = None
            self._set_lengths(row, dict.fromkeys(self._stages, 0), next_position=0)
        for start, held in self._lengths.items():
            # Not at half: a row that comes and goes would move all others each time.
            if 4 * (max(held) + 1) <= self._places[start]:
                self._lay_out(start, _doubled(2 * (max(held) + 1), self._most[start]))

    @one_at_a_time
    @torch.no_grad()
    def write(
        self,
        slot: Slot,
        output: Any,
        rows: Sequence[int] | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> None:
        """Write the keys and values of prompts into the rows of a slot, instead of what they held.

        Args:
            slot: that was claimed.
            output: of a call of the model, with its cache of B rows.
            rows: of the output, for each row of the slot one; None for all in order.
            attention_mask: ``[B, S]``, that of the prompts; needed if they had no visual tokens and ran unrouted.
                There may be no padding then.

        Raises:
            InputError: the slot was released, the cache is of another model, or a row is longer than the pool has
                places. Nothing was written then.
        """
        self._check_held(slot)
        prompts = self._read_prompts(output, attention_mask)
        chosen = range(len(prompts.positions)) if rows is None else rows
        if len(chosen) != len(slot.rows) or not all(0 <= row < len(prompts.positions) for row in chosen):
            raise InputError(
                f"rows is {list(chosen)} for a slot of {len(slot.rows)} rows and an output of "
                f"{len(prompts.positions)}; expected a row of the output for each row of the slot."
            )
        for row in chosen:
            self._check_fits(row, {start: held[row] for start, held in prompts.lengths.items()})
        for row, prompt in zip(slot.rows, chosen, strict=True):
            lengths = {start: held[prompt] for start, held in prompts.lengths.items()}
            self._set_lengths(row, lengths, prompts.positions[prompt])
            self._make_room()
            self._copy_row(row, prompts, prompt)

    @one_at_a_time
    @torch.no_grad()
    def step(self, tokens: torch.Tensor, active: Sequence[bool]) -> torch.Tensor:
        """Feed a token to each row that takes part. The device is not waited for.

        Args:
            tokens: ``[rows]`` int64, on the device of the model; those of other rows are not looked at.
            active: for each row whether it takes part, on the host.

        Returns:
            Logits ``[rows, V]`` of the token that follows; those of other rows mean nothing.

        Raises:
            InputError: sizes that are not those of the pool, no row that takes part, or one that was released, holds no
                prompt or is full. Nothing was changed then.
        """
        taking_part = [bool(each) for each in active]
        self._check_step(tokens, taking_part)
        self._make_room()
        if taking_part != self._takes_part:
            self._takes_part = taking_part
            self._active.copy_(torch.tensor(taking_part, dtype=torch.int64))
        rows = self._rows_that_run()
        given = (tokens * self._active)[:rows, None]
        with self._model.parts_checked():
            logits = self._model(input_ids=given, past_key_values=self._cache_of(rows)).logits[:, -1]
        counts = [*self._tokens.values(), self._next_position]
        torch._foreach_add_(counts, [self._active] * len(counts))
        for held in self._lengths.values():
            held[:] = [length + new for length, new in zip(held, taking_part, strict=True)]
        return F.pad(logits, (0, 0, 0, self.rows - rows)) if rows < self.rows else logits

    def _rows_that_run(self) -> int:
        """Those up to the last one that takes part, doubled from 1."""
        last = max(row for row, takes_part in enumerate(self._takes_part) if takes_part)
        return min(self.rows, 1 << last.bit_length())

    def _cache_of(self, rows: int) -> "_StepCache":
        """The first rows of the pool as a cache."""
        if rows != self._cached_rows:
            self._cached_rows = rows
            self._cache.layers = [
                _layer(*(states[:rows] for states in self._states(start, layer)))
                for start, (first, end) in self._stages.items()
                for layer in range(first, end)
            ]
        longest = {start: max(held) for start, held in self._lengths.items()}
        self._cache.rows = CachedRows(
            self._model.routing_config,
            self._model.cache_owner,
            columns=longest[0],
            filled=longest,
            tokens={start: tokens[:rows] for start, tokens in self._tokens.items()},
            next_position=self._next_position[:rows],
            gone=self._gone[:rows],
        )
        return self._cache

    def _states(self, start: int, layer: int) -> tuple[torch.Tensor, ...]:
        """Keys and values of a layer in the stage that begins with `start`, ``[rows, Hkv, C, D]``."""
        heads, width = self._shape
        shape = self.rows, heads, self._places[start], width
        return tuple(held[: self.rows * heads * shape[2] * width].view(shape) for held in self._memory[layer])

    def _set_lengths(self, row: int, lengths: dict[int, int], next_position: int) -> None:
        for start, length in lengths.items():
            self._lengths[start][row] = length
            self._tokens[start][row] = length
        self._next_position[row] = next_position

    def _make_room(self) -> None:
        """Let each stage have a place behind the last token of every row: rows that sit a step out write there, too."""
        for start, held in self._lengths.items():
            if max(held) + 1 > self._places[start]:
                self._lay_out(start, _doubled(max(held) + 1, self._most[start]))

    @torch.no_grad()
    def _lay_out(self, start: int, places: int) -> None:
        """Give every row of a stage as many places, in the same memory."""
        kept = min(places, self._places[start])
        first, end = self._stages[start]
        before = {layer: self._states(start, layer) for layer in range(first, end)}
        self._places[start], self._cached_rows = places, 0
        for layer, states in before.items():
            for held, old, new in zip(self._memory[layer], states, self._states(start, layer), strict=True):
                moved = old[:, :, :kept].clone()
                held.zero_()
                new[:, :, :kept] = moved

    def _copy_row(self, row: int, prompts: "_Prompts", prompt: int) -> None:
        """Keys and values of a prompt, and zeros behind them: what was NaN there would show through a mask."""
        written, copied, behind = [], [], []
        for start, (first, end) in self._stages.items():
            length = prompts.lengths[start][prompt]
            for layer in range(first, end):
                pair = prompts.layers[layer]
                for own, given in zip(self._states(start, layer), (pair.keys, pair.values), strict=True):
                    written.append(own[row, :, :length])
                    copied.append(given[prompt, :, :length])
                    behind.append(own[row, :, length:])
        torch._foreach_copy_(written, copied)
        torch._foreach_zero_(behind)

    def _read_prompts(self, output: Any, attention_mask: torch.Tensor | None) -> "_Prompts":
        cache: Any = getattr(output, "past_key_values", None)
        if not getattr(cache, "layers", None):
            raise InputError(
                "The output holds no cache; expected that of a call of the model with a prompt. Leave use_cache unset."
            )
        rows = getattr(cache, "rows", None)
        if rows is not None:
            check_owner(rows, self._model.routing_config, self._model.cache_owner)
            # One copy to the host, which the first token of the answer waits for anyway.
            counts = torch.stack([*rows.tokens.values(), rows.next_position]).tolist()
            return _Prompts(cache.layers, dict(zip(rows.tokens, counts, strict=False)), counts[-1])
        batch, length = len(cache.layers[0].keys), cache.get_seq_length()
        check_plain_cache(cache, self._model.config, batch)
        if attention_mask is None or attention_mask.shape != (batch, length) or not attention_mask.all():
            given = "None" if attention_mask is None else f"of shape {list(attention_mask.shape)}"
            raise InputError(
                f"attention_mask is {given}, and the prompts ran unrouted, for they have no visual tokens; expected a "
                f"mask of ones, [{batch}, {length}]: the cache of a padded batch doesn't tell its padding. Run prompts "
                f"without pictures alone, or with others of their length, and pass their mask."
            )
        return _Prompts(cache.layers, dict.fromkeys(self._stages, [length] * batch), [length] * batch)

    def _check_fits(self, prompt: int, lengths: dict[int, int]) -> None:
        for start, length in lengths.items():
            if length >= self._most[start]:
                raise InputError(
                    f"Row {prompt} of the output has {length} tokens in the layers from {start} on; expected at most "
                    f"{self._most[start] - 1} in a pool of capacity={self.capacity} and visual_tokens="
                    f"{self._visual_tokens}. Nothing was written. Make a larger pool, or send a shorter prompt."
                )

    def _check_held(self, slot: Slot) -> None:
        if not all(row < self.rows and self._slots[row] is slot for row in slot.rows):
            raise InputError(
                f"The slot of rows {list(slot.rows)} was released, or is of another pool; expected one that is held. "
                f"Claim one and write its prompt."
            )

    def _check_step(self, tokens: torch.Tensor, active: list[bool]) -> None:
        check_tensors({"tokens": tokens}, self._model.device)
        if tokens.shape != (self.rows,) or tokens.dtype != torch.int64 or len(active) != self.rows:
            raise InputError(
                f"tokens has dtype {tokens.dtype} and shape {list(tokens.shape)}, and active {len(active)} entries; "
                f"expected int64 and one for each of the pool's {self.rows} rows."
            )
        if not any(active):
            raise InputError("active marks no row; expected one or more that take part in the step.")
        for row in (row for row, takes_part in enumerate(active) if takes_part):
            if self._slots[row] is None or not self._lengths[0][row]:
                state = "was released" if self._slots[row] is None else "holds no prompt"
                raise InputError(
                    f"active marks row {row}, which {state}; expected rows of slots with a prompt. Nothing was changed."
                )
            for start, held in self._lengths.items():
                if held[row] + 1 >= self._most[start]:
                    raise InputError(
                        f"Row {row} is full: it has {held[row]} tokens in the layers from {start} on; expected at most "
                        f"{self._most[start] - 2} before a step in a pool of capacity={self.capacity} and "
                        f"visual_tokens={self._visual_tokens}. Nothing was changed. Release its slot."
                    )


@dataclass(frozen=True)
class _Prompts:
    """What a prefill left.

    Attributes:
        layers: keys and values ``[B, Hkv, S', D]``, tokens first.
        lengths: tokens of each row in each stage, by the stage's first layer.
        positions: of each row's next token.
    """

    layers: Sequence[Any]
    lengths: dict[int, list[int]]
    positions: list[int]


class _StepCache(RoutedCache):
    """Rows of a pool for one step. The pool makes room, and counts the rows that took part."""

    def reserve(self, new: int) -> None:
        pass

    def advance(
        self, columns: int, tokens: torch.Tensor, states: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> None:
        pass


def _layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _doubled(needed: int, most: int) -> int:
    """`LEAST_CAPACITY`, doubled until it is `needed` or more; at most `most`."""
    capacity = LEAST_CAPACITY
    while capacity < needed:
        capacity *= 2
    return min(capacity, most)


def _refuse_other_layers(model: RoutedModel) -> None:
    program = getattr(getattr(model, "programs", {}).get("continuation"), "program", None)
    taken = program.graph_signature.user_inputs if program is not None else ()
    if any(index_cache_input(start) in taken for start in (0, *model.routing_config.decision_layers)):
        raise UnsupportedModelError(
            f"Layers of {type(model).__name__} see windows or chunks of tokens; expected layers that see all earlier "
            f"tokens, which is what a pool has caches for. Use a RoutedCache for each conversation."
        )
    if any(reach.state for reach in getattr(model.report, "reaches", ())):
        raise UnsupportedModelError(
            f"Layers of {type(model).__name__} know earlier tokens by a state (linear attention, convolutions); "
            f"expected attention in all of them, which is what a pool has caches for. Use a RoutedCache for each "
            f"conversation."
        )
    if len({layer.kv_width for layer in getattr(model.report, "layers", ())}) > 1:
        raise UnsupportedModelError(
            f"Layers of {type(model).__name__} have keys of different widths; expected one width, which is what a pool "
            f"has caches for. Use a RoutedCache for each conversation."
        )
    sources = getattr(model.report, "sources", ())
    if any(source != layer for layer, source in enumerate(sources)):
        raise UnsupportedModelError(
            f"Layers of {type(model).__name__} share the caches of earlier layers; expected layers with keys and "
            f"values of their own, which is what a pool has caches for. Use a RoutedCache for each conversation."
        )
    if latent_width(model.config) is not None:
        raise UnsupportedModelError(
            f"Layers of {type(model).__name__} compute keys and values of latent vectors, which prompts without visual "
            f"tokens leave in their cache, and others their keys; expected keys and values of all prompts. Use a "
            f"RoutedCache for each conversation."
        )


def _check_numbers(model: Any, rows: int, capacity: int, visual_tokens: int) -> None:
    if not isinstance(model, RoutedModel):
        raise ConfigError(
            f"model is a {type(model).__name__}; expected a routed model. Pass what reroute_fx.compile or "
            f"reroute_fx.load returned."
        )
    for name, number, least in (
        ("rows", rows, 1),
        ("capacity", capacity, 2),
        ("visual_tokens", visual_tokens, 0),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ConfigError(f"{name} is {number!r}; expected a whole number of {least} or more.")
    if visual_tokens >= capacity - 1:
        raise ConfigError(
            f"visual_tokens is {visual_tokens} and capacity {capacity}; expected room for text as well: at most "
            f"{capacity - 2} visual tokens."
        )
    limits = getattr(model, "limits", None)
    for name, asked, limit in (("rows", rows, "batch"), ("capacity", capacity, "length")):
        if limits is not None and asked > getattr(limits, limit):
            raise ConfigError(
                f"{name} is {asked}; expected at most limits.{limit}={getattr(limits, limit)} of the artifact. Export "
                f"the model with larger limits."
            )
