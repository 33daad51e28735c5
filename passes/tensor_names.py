"""What the tensors of a routed program are called: passes give the names, who calls the program reads them.

An input is a placeholder of the graph, whose name has to be one in Python; an output has a dot before its number.
Numbers are those of layers; for what a stage has once, that of its first layer.
"""

from typing import Literal, cast

VISUAL_INDEX, LENGTHS, POOLS = "visual_index", "lengths", "pools"
"""Inputs that a program has once; see `InsertSelection`."""
VISUAL_TOKENS = "visual_tokens"
"""Name of the size N."""
TEXT_INDEX, TEXT_TOKENS = "text_index", "text_tokens"
"""Places of the text behind the last picture, and the name of how many there are; only for rules that ask it."""
CELLS = ("rows", "columns", "images")
"""Where each visual token lies in its picture, and in which one; each only for rules that ask it."""
ALWAYS = "always"
"""Which visual tokens the first decisions keep whatever their scores; only where there are such."""
BLOCKS, MIDDLES = "blocks", "middles"
"""Inputs of `PoolBlocks`; the second is the name of a size, too."""
GROUPS = "groups"
"""Input of `SeeGroups`."""
NEW_TOKENS = "new_tokens"
"""How many tokens of a call each row has; only for layers with a state."""
INPUTS_EMBEDS, POSITION_IDS = "inputs_embeds", "position_ids"
"""Inputs of the decoder that was exported."""

_ADDEND = "addend"

Cached = Literal["key", "value"]
CACHED: tuple[Cached, ...] = ("key", "value")
Output = Literal["key", "value", "index", "scores", "kept", "stream"]


def keep_input(layer: int) -> str:
    """Which places of the ranking a decision keeps."""
    return f"keep_{layer}"


def slots_input(layer: int) -> str:
    """A tensor as long as the stage that begins with a decision, and the name of that size."""
    return f"slots_{layer}"


def positions_input(layer: int) -> str:
    """Rotary positions of the stage that begins with a layer, where stages count their own."""
    return f"{POSITION_IDS}_{layer}"


def addend_input(layer: int) -> str:
    """What is added to the stream at a layer and does not come from it, ``[B, S, d]``."""
    return f"{_ADDEND}_{layer}"


def is_addend_input(name: str) -> bool:
    """Whether an input is an addend of a layer."""
    return name.startswith(f"{_ADDEND}_")


def cached_input(layer: int) -> str:
    """How many tokens of each row the caches of a stage hold."""
    return f"cached_{layer}"


def capacity_size(layer: int) -> str:
    """Name of the size of a stage's caches."""
    return f"capacity_{layer}"


def cache_input(kind: Cached, layer: int) -> str:
    """The cache of a layer's keys or values."""
    return f"{kind}_cache_{layer}"


def index_cache_input(layer: int) -> str:
    """Which tokens of the conversation the caches of a stage hold."""
    return f"index_cache_{layer}"


def is_cache_input(name: str) -> bool:
    """Whether an input is a cache of keys or values."""
    return name.startswith(tuple(f"{kind}_cache_" for kind in CACHED))


def output_name(kind: Output, layer: int) -> str:
    """What a program returns besides hidden states."""
    return f"{kind}.{layer}"


def read_output_name(name: str) -> tuple[Output, int]:
    """The kind and the layer of an output."""
    kind, _, layer = name.partition(".")
    return cast(Output, kind), int(layer)
