"""Which visual tokens of a row belong to which image."""

from collections.abc import Container, Mapping

import torch

from ..errors import InputError


def split_images(
    ids: torch.Tensor, is_visual: torch.Tensor, sizes: Mapping[int, list[int]]
) -> list[list[tuple[int, int]]]:
    """Placeholder and visual tokens of each image of each row.

    Args:
        ids: ``[B, S]`` on the host.
        is_visual: ``[B, S]`` bool.
        sizes: visual tokens of each image in the order of the batch, by placeholder id; for ids that are missing
            an image is a run of neighbouring placeholders.
    """
    left = {token: list(counts) for token, counts in sizes.items()}
    rows = []
    for row, (row_ids, visual) in enumerate(zip(ids, is_visual, strict=True)):
        runs = _runs(row_ids[visual].tolist(), visual.nonzero().flatten().tolist(), left)
        rows.append([(token, n) for token, run in runs for n in _images_of_run(token, run, row, left)])
    for token, counts in left.items():
        if counts:
            raise InputError(
                f"{len(counts)} images or videos are left over after the last row: the rows hold "
                f"{(ids == token).sum(dim=1).tolist()} placeholders with id {token}, and the images need "
                f"{sizes[token]}. Pass input_ids and pixel_values as the processor returned them."
            )
    return rows


def _runs(ids: list[int], positions: list[int], known: Container[int]) -> list[tuple[int, int]]:
    """Id and length of each run of placeholders with one id; text in between ends a run if its id is not known."""
    runs: list[tuple[int, int]] = []
    for i, (token, position) in enumerate(zip(ids, positions, strict=True)):
        if i and token == ids[i - 1] and (token in known or position == positions[i - 1] + 1):
            runs[-1] = token, runs[-1][1] + 1
        else:
            runs.append((token, 1))
    return runs


def _images_of_run(token: int, run: int, row: int, left: dict[int, list[int]]) -> list[int]:
    """Take the images of a run of placeholders from those that are left."""
    if token not in left:
        return [run]
    images: list[int] = []
    while sum(images) < run and left[token]:
        images.append(left[token].pop(0))
    if sum(images) != run:
        raise InputError(
            f"Row {row} holds a run of {run} placeholders with id {token}, but the images that are due there have "
            f"{images or 'no'} features; expected one placeholder for each feature. Pass input_ids and pixel_values as "
            f"the processor returned them."
        )
    return images
