"""The contract of a call: names, kinds and sizes of its inputs."""

from ..capture.cropped_images import CroppedImages
from ..capture.image_layout import AnyImages, FixedImages, SizedImages, TiledImages
from ..capture.patched_images import PatchedImages
from .manifest import InputSpec

_TEXT = {
    "input_ids": InputSpec("int64", ("batch", "length"), required=True),
    "attention_mask": InputSpec("int64", ("batch", "length"), required=False),
}


def input_contract(images: AnyImages, dtype: str) -> dict[str, InputSpec]:
    """Inputs of a model that takes such pictures and has weights of such a dtype."""
    if isinstance(images, (FixedImages, TiledImages)):
        size = images.channels, images.height, images.width
        count = ("pictures",) if isinstance(images, FixedImages) else ("batch", "tiles")
        return {**_TEXT, "pixel_values": InputSpec(dtype, (*count, *size), required=True)}
    if isinstance(images, CroppedImages):
        tile = images.channels, images.edge, images.edge
        frames = {"pixel_values_videos": InputSpec(dtype, ("videos", "frames", *tile), required=False)}
        return {
            **_TEXT,
            "pixel_values": InputSpec(dtype, ("pictures", "tiles", *tile), required=False),
            "image_sizes": InputSpec("int64", ("pictures", 2), required=False),
            "batch_num_images": InputSpec("int64", ("groups",), required=False),
            **(frames if images.takes_videos else {}),
        }
    if isinstance(images, SizedImages):
        return _TEXT | {
            "pixel_values": InputSpec(dtype, ("pictures", images.channels, "height", "width"), required=True),
            "image_sizes": InputSpec("int64", ("pictures", 2), required=True),
        }
    if isinstance(images, PatchedImages) and images.padded:
        return _TEXT | {
            "pixel_values": InputSpec(dtype, ("pictures", "patches", *images.values), required=True),
            "spatial_shapes": InputSpec("int64", ("pictures", 2), required=True),
            "pixel_attention_mask": InputSpec("int64", ("pictures", "patches"), required=False),
        }
    if isinstance(images, PatchedImages):
        return _TEXT | {
            "pixel_values": InputSpec(dtype, ("patches", *images.values), required=True),
            "image_grid_thw": InputSpec("int64", ("pictures", 3), required=True),
        }
    return _TEXT | {
        "pixel_values": InputSpec(dtype, ("patches", images.values), required=False),
        "image_grid_thw": InputSpec("int64", ("pictures", 3), required=False),
        "pixel_values_videos": InputSpec(dtype, ("patches", images.values), required=False),
        "video_grid_thw": InputSpec("int64", ("videos", 3), required=False),
        "second_per_grid_ts": InputSpec("float32", ("videos",), required=False),
    }
