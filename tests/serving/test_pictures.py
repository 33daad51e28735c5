"""Pictures that strangers send: decoded upright, or refused with the field before they cost anything."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from serving_models import data_url, encoded, picture

from reroute_fx.serving.bounds import Bounds
from reroute_fx.serving.pictures import decode_picture, read_data_url
from reroute_fx.serving.refusals import RequestError

FIELD = "messages[0].content[1].image_url.url"
IMAGE = picture(0, (32, 16))


def png(width, height, bits=8, rows=b""):
    """A PNG in colour that says it has these sizes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_a_picture_is_what_it_was(format):
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_picture(encoded(IMAGE, format, **options), FIELD, Bounds())
    assert decoded.mode == "RGB"
    assert np.array_equal(decoded, IMAGE)


def test_a_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_picture(encoded(IMAGE, exif=exif), FIELD, Bounds())
    assert np.array_equal(decoded, IMAGE.transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK"])
def test_other_modes_of_8_bits_become_rgb(mode):
    source = IMAGE.convert(mode)
    decoded = decode_picture(encoded(source, "JPEG" if mode == "CMYK" else "PNG"), FIELD, Bounds())
    assert (decoded.mode, decoded.size) == ("RGB", (32, 16))


WHOLE = encoded(IMAGE)
REFUSED = {
    "nothing": (b"", "can't be read"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "can't be read"),
    "tiff": (encoded(IMAGE, "TIFF"), "can't be read"),
    "truncated": (WHOLE[:-40], "can't be read"),
    "no rows": (png(8, 8), "can't be read"),
    "no pixels": (png(0, 8), "can't be read"),
    "grey of 16 bits": (encoded(Image.fromarray(np.zeros((4, 4), np.uint16))), "more than 8 bits"),
    "colour of 16 bits": (png(2, 2, 16, bytes(26)), "more than 8 bits"),
    "animated": (
        encoded(IMAGE, "GIF", save_all=True, append_images=[IMAGE.rotate(90)]),
        "2 frames; expected one",
    ),
    "large": (png(1001, 1000), "1001 x 1000 pixels; expected at most 1000000"),
    "bomb": (png(2**31 - 1, 2**31 - 1), "more than 1000000 pixels"),
    "many bytes": (WHOLE + bytes(10_000), "bytes; expected at most 10000"),
    "many scans": (encoded(IMAGE, "JPEG") + b"\xff\xda" * 100, "a JPEG of 101 scans"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_picture_is_refused(name):
    data, message = REFUSED[name]
    with pytest.raises(RequestError, match=message) as caught:
        decode_picture(data, FIELD, Bounds(pixels=10**6, picture_bytes=10_000))
    assert caught.value.field == FIELD
    assert str(caught.value).startswith(FIELD)
    assert "0x" not in str(caught.value)


def test_a_data_url_is_read():
    for kind in ("image/png", "image/jpeg", "image/svg+xml;charset=utf-8", ""):
        assert read_data_url(data_url(WHOLE, kind), FIELD, Bounds()) == WHOLE


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "starts with ''"),
        ("file:///etc/passwd", "starts with 'file:///etc/pass'"),
        ("data:image/png,plain", "starts with"),
        ("data:image/png;base64,not base64!", "is no base64"),
        ("data:image/png;base64,YWJ", "is no base64"),
        ("data:image/png;base64," + "A" * 14_000, "bytes; expected at most 10000"),
        ("data:" + ";a" * 50_000, "starts with"),
    ],
)
def test_another_url_is_refused(url, message):
    with pytest.raises(RequestError, match=message) as caught:
        read_data_url(url, FIELD, Bounds(picture_bytes=10_000))
    assert caught.value.field == FIELD
