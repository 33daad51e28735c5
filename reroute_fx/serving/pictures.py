"""Pictures that strangers send: bounded before they are decoded."""

import base64
import binascii
import io
import re
import warnings

from PIL import Image, ImageOps

from ..loading.prompts import EIGHT_BITS
from .bounds import Bounds
from .refusals import RequestError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_DATA_URL = re.compile(r"data:(?P<kind>[\w.+/-]*)(;[\w.+=-]+)*?;base64,")
_SCAN = b"\xff\xda"
"""Start of a scan of a JPEG. Compressed data never holds it."""
_MOST_SCANS = 100
"""Each decodes the whole picture again; encoders make about ten."""
_MOST_SLENDER = 100
"""Longer side by shorter: processors that scale the shorter side up would make gigabytes of a line."""


def read_data_url(url: str, field: str, bounds: Bounds) -> bytes:
    """The bytes of a base64 data URL.

    Raises:
        RequestError: it is none, or longer than a picture may be.
    """
    head = _DATA_URL.match(url)
    if head is None:
        raise RequestError(field, f"starts with {url[:16]!r}; expected data:image/...;base64,...")
    if (length := (len(url) - head.end()) // 4 * 3) > bounds.picture_bytes + 3:
        raise RequestError(field, f"has {length} bytes; expected at most {bounds.picture_bytes}.")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(field, f"is no base64; expected that behind the comma. {error}.") from None


def decode_picture(data: bytes, field: str, bounds: Bounds) -> Image.Image:
    """A picture in RGB, upright as its EXIF orientation says.

    Raises:
        RequestError: it is of another format, too large, animated, has more than 8 bits a channel, or can't be read to
            its end.
    """
    if len(data) > bounds.picture_bytes:
        raise RequestError(field, f"has {len(data)} bytes; expected at most {bounds.picture_bytes}.")
    if data.count(_SCAN) > _MOST_SCANS:
        raise RequestError(field, f"is a JPEG of {data.count(_SCAN)} scans; expected at most {_MOST_SCANS}.")
    try:
        # What Pillow warns of has bounds here.
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_head(image, field, bounds)
            return ImageOps.exif_transpose(image).convert("RGB")
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise RequestError(field, f"has more than {bounds.pixels} pixels. Make it smaller.") from None
    except (OSError, SyntaxError, ValueError, MemoryError, OverflowError):
        # Without Pillow's reason, which names its own objects.
        raise RequestError(
            field, f"can't be read to its end as a picture; expected a whole {' or '.join(FORMATS)}."
        ) from None


def _check_head(image: Image.Image, field: str, bounds: Bounds) -> None:
    """Look at what is known before anything is decoded."""
    width, height = image.size
    if width * height > bounds.pixels:
        raise RequestError(
            field, f"has {width} x {height} pixels; expected at most {bounds.pixels}. Make it smaller."
        )
    if max(width, height) > _MOST_SLENDER * min(width, height):
        raise RequestError(
            field, f"has {width} x {height} pixels; expected sides of at most {_MOST_SLENDER} to 1."
        )
    if getattr(image, "n_frames", 1) > 1:
        raise RequestError(field, f"is animated, with {image.n_frames} frames; expected one. Send a frame.")  # type: ignore[attr-defined]
    # Of a PNG of 16 bits in colour, which it calls RGB, Pillow would keep the upper half.
    raw = [tile[3] for tile in getattr(image, "tile", ())]
    if image.mode not in EIGHT_BITS or any(isinstance(mode, str) and "16" in mode for mode in raw):
        raise RequestError(field, f"has more than 8 bits a channel (mode {image.mode!r}); expected 8.")
