"""What the tower is trained to say: of each patch which thing it lies on, and where that thing's box is."""

from typing import Any

import numpy as np
import torch.nn.functional as F
from small_llava import PATCH, WIDTH
from torch import Tensor, nn

from reroute_fx.grounding.scenes import COLOURS, SHAPES, SIDE, SIZES, TEXTURES, Scene

FIELDS = {"size": tuple(SIZES), "texture": TEXTURES, "colour": tuple(COLOURS), "shape": SHAPES}
"""Words for a thing."""
PATCHES = SIDE // PATCH
NOTHING = -100
"""The label of patches that lie on no thing."""
_KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]


class TowerHeads(nn.Module):
    """Heads for labels of patches, and of the picture for the kinds of things in it; thrown away after training."""

    def __init__(self) -> None:
        super().__init__()
        self.covered = nn.Linear(WIDTH, 1)
        self.words = nn.ModuleDict({field: nn.Linear(WIDTH, len(words)) for field, words in FIELDS.items()})
        self.box = nn.Linear(WIDTH, 4)
        self.kinds = nn.Linear(WIDTH, len(_KINDS))

    def forward(self, patches: Tensor, picture: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Losses; `[B, N, d]` and `[B, d]` against what `tower_labels` says."""
        on = labels["size"] != NOTHING
        covered = self.covered(patches).squeeze(-1)
        losses = {"covered": F.binary_cross_entropy_with_logits(covered, on.to(covered.dtype))}
        for field, head in self.words.items():
            losses[field] = F.cross_entropy(head(patches[on]), labels[field][on])
        losses["box"] = 5 * F.l1_loss(self.box(patches[on]).sigmoid(), labels["box"][on])
        losses["kinds"] = F.binary_cross_entropy_with_logits(self.kinds(picture), labels["kinds"])
        return losses


def tower_labels(scene: Scene) -> dict[str, np.ndarray]:
    """For each patch, by rows, the thing in whose box its centre lies; for the picture the kinds of things."""
    labels: dict[str, np.ndarray] = {f: np.full((PATCHES, PATCHES), NOTHING) for f in FIELDS}
    labels["box"] = np.zeros((PATCHES, PATCHES, 4), dtype=np.float32)
    labels["kinds"] = np.zeros(len(_KINDS), dtype=np.float32)
    centres = (np.arange(PATCHES) + 0.5) * PATCH
    for thing in scene.things:
        columns, rows = (
            np.flatnonzero((centres >= low) & (centres < low + thing.side)) for low in thing.corner
        )
        here = np.ix_(rows, columns)
        for field, words in FIELDS.items():
            labels[field][here] = words.index(getattr(thing, field))
        labels["box"][here] = thing.box
        labels["kinds"][_KINDS.index((thing.colour, thing.shape))] = 1
    flat = {name: value.reshape(-1, *value.shape[2:]) for name, value in labels.items() if name != "kinds"}
    return flat | {"kinds": labels["kinds"]}


def tower_features(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """What LLaVA takes of each patch `[B, N, d]`, and the class token after the last layer `[B, d]`."""
    out = model.model.vision_tower(pixels, output_hidden_states=True)
    return out.hidden_states[model.config.vision_feature_layer][:, 1:], out.pooler_output
