"""Random inputs of the operators that several test files share."""

import math

import torch

NO_TOKEN = 2**63 - 1

# Of each row its length and its pools. Of each pool its entries, how many of them stand for a token, and how many
# tokens are kept.
SELECTIONS = {
    "one token": [(1, [(1, 1, 1)])],
    "unequal rows": [(100, [(63, 63, 7)]), (41, [(20, 20, 2)]), (12, [(1, 1, 1)])],
    "rows without visual tokens": [(20, []), (9, [(6, 6, 2)]), (1, [])],
    "no visual tokens": [(20, []), (7, [])],
    "several pools": [
        (100, [(30, 30, 3), (1, 1, 1), (20, 20, 20), (9, 9, 4)]),
        (50, [(40, 40, 1)]),
        (30, [(5, 5, 5), (5, 5, 1)]),
        (4, []),
    ],
    "after a deletion": [(60, [(63, 40, 7)]), (41, [(20, 20, 2)]), (9, [(30, 1, 1)])],
    "several pools after a deletion": [(60, [(30, 3, 3), (20, 20, 1), (9, 1, 1)]), (40, [(40, 12, 5)])],
}


def uniform(count, generator):
    return torch.rand(count, generator=generator)


def selection_inputs(rows, values=uniform, padding=0, more_slots=0, dtype=torch.float32, seed=0):
    """Inputs of `select_tokens`: random positions, and as scores what `values` makes of a count and a generator.

    There are `padding` places more than the longest row has, and `more_slots` more than are needed.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(1, *(sum(pool[0] for pool in pools) for _, pools in rows))
    scores = torch.full((len(rows), width), -math.inf)
    visual_index = torch.full((len(rows), width), NO_TOKEN)
    keep = torch.zeros(len(rows), width, dtype=torch.bool)
    numbers = torch.empty(len(rows), width, dtype=torch.int64)
    for row, (length, pools) in enumerate(rows):
        start, columns = 0, []
        numbers[row] = len(pools)
        for number, (entries, tokens, kept) in enumerate(pools):
            columns += (start + torch.randperm(entries, generator=generator)[:tokens].sort().values).tolist()
            keep[row, start : start + kept] = True
            numbers[row, start : start + entries] = number
            start += entries
        scores[row, columns] = values(len(columns), generator)
        order = torch.randperm(length, generator=generator)
        visual_index[row, columns] = order[: len(columns)].sort().values
    several = any(len(pools) > 1 for _, pools in rows)
    slots = max(length - sum(tokens - kept for _, tokens, kept in pools) for length, pools in rows)
    length = max(length for length, _ in rows) + padding
    lengths = torch.tensor([length for length, _ in rows])
    inputs = scores.to(dtype), visual_index, lengths, keep, numbers if several else None, length
    return *inputs, slots + more_slots


def scoring_inputs(heads, kv_heads, places, head_dim, lengths, tokens, dtype=torch.float32, seed=0):
    """Inputs of `visual_scores`; for each row `lengths` and `tokens` name its length and its visual tokens."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(len(lengths), heads, 1, head_dim, generator=generator).to(dtype)
    keys = torch.randn(len(lengths), kv_heads, places, head_dim, generator=generator).to(dtype)
    width = max(1, *tokens)
    index = []
    for length, count in zip(lengths, tokens, strict=True):
        # The first padding place, the first place past the stream, and the largest number stand for no token.
        row = torch.tensor([length, places, NO_TOKEN]).repeat(width)[:width]
        columns = torch.randperm(width, generator=generator)[:count].sort().values
        row[columns] = torch.randperm(length, generator=generator)[:count].sort().values
        index.append(row)
    return query, keys, torch.stack(index), torch.tensor(lengths), head_dim**-0.5


def random_bits(*shape, dtype=torch.float32, seed=0):
    """Every pattern of bits that the dtype has, NaNs with payloads included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    integers = torch.randint(256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return integers.view(dtype)[..., 0]


def as_integers(x):
    """The same bits; torch's gather makes all NaNs of 16 bits the same."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def positions_of(length, active, slots, seed=0):
    """Of each row `active` names how many of its `slots` places hold a position below `length`."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.tensor([length, length + 1, NO_TOKEN]).repeat(slots)[:slots].repeat(len(active), 1)
    for row, count in enumerate(active):
        positions[row, :count] = torch.randperm(length, generator=generator)[:count].sort().values
    return positions


def stream_by_loops(stream, rows, positions):
    """What `restore_tokens` returns, as nested lists; Python's numbers hold every value of 16 and 32 bits exactly."""
    result = stream.tolist()
    for sample, (new, places) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
        for row, place in zip(new, places, strict=True):
            if place < len(result[sample]):
                result[sample][place] = row
    return result
