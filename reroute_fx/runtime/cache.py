"""The key-value cache of a routed model: every layer holds the tokens that ran through it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..config.routing_config import RoutingConfig
from ..errors import InputError
from ..passes.tensor_names import cache_input, cached_input, index_cache_input, output_name


@dataclass(frozen=True)
class CachedRows:
    """What is in a cache, for each stage (the layers from one decision layer to the next) and row.

    Attributes:
        config: the configuration that routed the prompt.
        owner: identity of the model that made the cache.
        columns: length that Hugging Face counts: places of the prompt and of all calls since, padding included.
        filled: for each first layer of a stage, places in use in the longest row.
        tokens: for each first layer of a stage, tokens of each row, ``[B]`` int64. They lie at the front.
        next_position: rotary position of each row's next token, ``[B]`` int64.
        gone: visual tokens of each row's prompt that did not enter the decoder, ``[B]`` int64.
    """

    config: RoutingConfig
    owner: str
    columns: int
    filled: Mapping[int, int]
    tokens: Mapping[int, torch.Tensor]
    next_position: torch.Tensor
    gone: torch.Tensor

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "CachedRows":
        tokens = {start: change(rows) for start, rows in self.tokens.items()}
        return replace(self, tokens=tokens, next_position=change(self.next_position), gone=change(self.gone))


class RoutedCache(DynamicCache):
    """Keys and values of a conversation with a routed model.

    `generate` and `forward` make one when none is given; a plain empty `DynamicCache` that is given becomes one in
    place. Before a prompt with visual tokens, and if none comes, it is an ordinary `DynamicCache`. After one
    each layer has a buffer of its own length ``[B, Hkv, C, D]``, but for those that read the one of another layer.
    Buffers hold exactly what `generate` asked for; outside `generate` they grow by doubling.

    Args:
        max_length: tokens, padding included, that a row may come to hold. A call that goes beyond is refused, and
            buffers are allocated for it once. None for no limit.

    Attributes:
        expected_length: length for which buffers are allocated; set by `generate`.
        rows: None as long as nothing was routed.
        indices: for each stage with windows, by its first layer, which token of its row each place holds, ``[B, C]``
            int64.
        stateful: layers whose keys and values are states of fixed size, ``[B, ...]``; no values where they have one.
    """

    max_length: int | None = None
    expected_length: int | None = None
    rows: CachedRows | None = None
    indices: dict[int, torch.Tensor]
    stateful: tuple[int, ...] = ()

    def __init__(self, max_length: int | None = None) -> None:
        super().__init__()
        self.max_length = max_length
        self.indices = {}

    @classmethod
    def adopt(cls, cache: DynamicCache) -> "RoutedCache":
        """Turn an empty `DynamicCache` into a `RoutedCache`, so that whoever holds it holds the conversation."""
        if not isinstance(cache, cls):
            cache.__class__ = cls
            cache.indices = {}
        assert isinstance(cache, cls)
        return cache

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values, room for new tokens included."""
        held = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.nbytes for t in held)

    def fill(
        self,
        rows: CachedRows,
        keys: Sequence[torch.Tensor | None],
        values: Sequence[torch.Tensor | None],
        indices: Mapping[int, torch.Tensor] = MappingProxyType({}),
        stateful: tuple[int, ...] = (),
    ) -> None:
        """Take the keys and values of a prompt, ``[B, Hkv, S', D]`` for each layer, and indices ``[B, S']``.

        A layer that reads the cache of another one has none.
        """
        layers = []
        for key, given in zip(keys, values, strict=True):
            layer = DynamicLayer()
            if key is not None:
                value = key[:, :0] if given is None else given
                layer.lazy_initialization(key, value)
                layer.keys, layer.values = key, value
            layers.append(layer)
        self.layers, self.rows, self.indices, self.stateful = layers, rows, dict(indices), stateful

    def check_room(self, columns: int) -> None:
        """Raise unless a row may grow to `columns` places."""
        if self.max_length is not None and columns > self.max_length:
            raise InputError(
                f"The call would bring the cache to {columns} tokens in a row; expected at most max_length="
                f"{self.max_length}. Nothing was changed. Use RoutedCache(max_length={columns}) or more, or none."
            )

    def reserve(self, new: int) -> None:
        """Make room for `new` places in every layer. What is cached stays as it is."""
        rows = self._routed()
        self.check_room(rows.columns + new)
        wanted = max(self.expected_length or 0, self.max_length or 0)
        for start, end in self._stages():
            growing = [
                layer
                for i, layer in enumerate(self.layers[start:end], start)
                if i not in self.stateful and layer.is_initialized
            ]
            if not growing:
                continue
            keys, needed = growing[0].keys, rows.filled[start] + new
            capacity = keys.shape[2]
            if needed > capacity:
                announced = rows.filled[start] + wanted - rows.columns
                capacity = announced if announced >= needed else max(needed, 2 * capacity)
            elif _is_buffer(keys):
                continue  # the layers of a stage are allocated together
            for layer in growing:
                layer.keys, layer.values = _fit(layer.keys, capacity), _fit(layer.values, capacity)
            if start in self.indices:
                self.indices[start] = _fit(self.indices[start][:, None, :, None], capacity)[:, 0, :, 0]

    def inputs(self) -> dict[str, torch.Tensor]:
        """Inputs that `AttendToCache` adds to a program."""
        given = {cached_input(start): tokens for start, tokens in self._routed().tokens.items()}
        given |= {index_cache_input(start): index for start, index in self.indices.items()}
        for i, layer in enumerate(self.layers):
            if not layer.is_initialized:
                continue
            given[cache_input("key", i)] = layer.keys
            if layer.values.numel() or i not in self.stateful:
                given[cache_input("value", i)] = layer.values
        return given

    def advance(
        self, columns: int, tokens: torch.Tensor, states: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> None:
        """Count what a program wrote: `tokens` ``[B]`` of `columns` new places in each row; and take its states."""
        rows = self._routed()
        for i in self.stateful:
            layer = self.layers[i]
            layer.keys = states[output_name("key", i)]
            layer.values = states.get(output_name("value", i), layer.values)
        self.rows = replace(
            rows.map_rows(lambda counts: counts + tokens),
            gone=rows.gone,
            columns=rows.columns + columns,
            filled={start: filled + columns for start, filled in rows.filled.items()},
        )

    def _routed(self) -> CachedRows:
        assert self.rows is not None
        return self.rows

    def _stages(self) -> list[tuple[int, int]]:
        starts = list(self._routed().filled)
        return list(zip(starts, [*starts[1:], len(self.layers)], strict=True))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.rows.columns if self.rows else super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self.rows:
            return self.rows.columns + query_length, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rows:
            raise InputError(
                "past_key_values was made by a routed model; expected to be used by that model. Its layers cache "
                "different numbers of tokens, which this model can't read."
            )
        states: tuple[torch.Tensor, torch.Tensor] = super().update(*args, **kwargs)
        return states

    @property
    def is_croppable(self) -> bool:
        return not self.rows and bool(super().is_croppable)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        if self.rows:
            raise InputError(
                "A routed cache can't be cropped; expected a conversation that only grows. Keep a copy.deepcopy of "
                "the cache to come back to an earlier state."
            )
        super().crop(*args, **kwargs)

    def reset(self) -> None:
        super().reset()
        if self.rows:
            self.layers, self.layer_class_to_replicate, self.rows = [], DynamicLayer, None
            self.stateful = ()
            self.indices = {}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])

    def _map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.rows:
            self.rows = self.rows.map_rows(change)
            self.indices = {start: change(index) for start, index in self.indices.items()}


def _fit(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """``[B, Hkv, capacity, D]``, contiguous, with `states` at the front; zeros behind, as masked NaNs would show."""
    if states.shape[2] == capacity and _is_buffer(states):
        return states
    batch, heads, length, width = states.shape
    buffer = states.new_zeros(batch, heads, capacity, width)
    buffer[:, :, :length] = states
    return buffer


def _is_buffer(states: torch.Tensor) -> bool:
    """Whether a program can write into `states`. What was made in inference mode is fixed outside it."""
    is_writable = torch.is_inference_mode_enabled() or not states.is_inference()
    return is_writable and states.is_contiguous() and states.storage_offset() == 0
