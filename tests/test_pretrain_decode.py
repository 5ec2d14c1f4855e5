"""Decoding: one reading of each fact of an image, and damage to its metadata is no damage to its pixels."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pretrain.data.decode import FORMATS, ImageRejected, decode, decode_rgb, open_image, upright_size
from pretrain.data.sample_depth import DepthSettings
from tests.conftest import encode_image, picture

WIDE = picture(3, (40, 20))
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
TURNS = {
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: np.rot90,
}
"""EXIF 2.3, table 6: how stored pixels become upright ones."""


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(png: bytes, inserted: bytes, before: bytes = b"IDAT") -> bytes:
    place = png.index(before) - 4
    return png[:place] + inserted + png[place:]


def exif(value: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = value
    return block.tobytes()


def tagged(kind: str, value: int, way: str) -> bytes:
    """An image with an orientation, told in some way."""
    png = encode_image(WIDE)
    match way:
        case "exif":
            return encode_image(WIDE, kind, exif=exif(value), **({"lossless": True} if kind == "WEBP" else {}))
        case "xmp":
            options = {"lossless": True} if kind == "WEBP" else {}
            return encode_image(WIDE, kind, xmp=XMP % value, **options)
        case "late exif":
            return with_chunk(png, chunk(b"eXIf", exif(value)[6:]), b"IEND")
        case "late xmp":
            return with_chunk(png, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % value), b"IEND")
        case "packed xmp":
            text = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP % value)
            return with_chunk(png, chunk(b"iTXt", text))
        case _:
            lines = f"\nexif\n{len(exif(value))}\n{exif(value).hex()}".encode()
            return with_chunk(png, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(lines)))


WAYS = [
    *[(kind, "exif") for kind in ("JPEG", "PNG", "WEBP", "TIFF")],
    *[(kind, "xmp") for kind in ("JPEG", "WEBP", "TIFF")],
    *[("PNG", way) for way in ("late exif", "late xmp", "packed xmp", "raw exif")],
]


@pytest.mark.parametrize(("kind", "way"), WAYS)
@pytest.mark.parametrize("value", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 99])
def test_an_orientation_is_read_alike_by_header_and_pixels(kind: str, way: str, value: int) -> None:
    data = tagged(kind, value, way)
    if kind == "TIFF" and way == "xmp":
        data = encode_image(WIDE, "TIFF", tiffinfo={700: XMP % value})
    image = open_image(data)
    pixels = np.asarray(decode(image))
    stored = np.asarray(
        Image.open(io.BytesIO(encode_image(WIDE, kind, **({"lossless": True} if kind == "WEBP" else {}))))
    )
    assert upright_size(open_image(data)) == (pixels.shape[1], pixels.shape[0])
    np.testing.assert_array_equal(pixels, TURNS.get(value, TURNS[1])(stored))


def test_exif_comes_before_xmp() -> None:
    data = encode_image(WIDE, "JPEG", exif=exif(1), xmp=XMP % 6)
    assert upright_size(open_image(data)) == decode_rgb(data).size == WIDE.size


def damaged() -> dict[str, bytes]:
    """Good pixels behind damaged metadata."""
    png, jpeg = encode_image(WIDE), encode_image(WIDE, "JPEG")
    gray = encode_image(WIDE.convert("L"))
    profile = zlib.compress(bytes(8 << 20))
    late = chunk(b"tEXt", b"\xff" * 50)
    return {
        "short eXIf": with_chunk(png, chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")),
        "oversized iCCP": with_chunk(png, chunk(b"iCCP", b"p\0\0" + profile)),
        "unknown iCCP": with_chunk(png, chunk(b"iCCP", b"p\0\7" + profile)),
        "oversized zTXt": with_chunk(png, chunk(b"zTXt", b"k\0\0" + profile)),
        "short tRNS": with_chunk(png, chunk(b"tRNS", b"\0")),
        "short tRNS of gray": with_chunk(gray, chunk(b"tRNS", b"\0")),
        "short cHRM": with_chunk(png, chunk(b"cHRM", b"\0")),
        "short gAMA": with_chunk(png, chunk(b"gAMA", b"")),
        "short pHYs": with_chunk(png, chunk(b"pHYs", b"\0\0")),
        "raw exif that is none": with_chunk(png, chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz")),
        "wrong checksum of a text": with_chunk(png, late[:-1] + bytes([late[-1] ^ 1])),
        "damaged text behind the pixels": with_chunk(png, chunk(b"zTXt", b"k\0\0" + profile), b"IEND"),
        "JPEG with damaged EXIF": jpeg[:2] + b"\xff\xe1\0\x0eExif\0\0MM\0\x2a\xff\xff" + jpeg[2:],
        "JPEG with a short MPF": jpeg[:2] + b"\xff\xe2\0\x08MPF\0\0\0" + jpeg[2:],
        "JPEG with a short ICC": jpeg[:2] + b"\xff\xe2\0\x0fICC_PROFILE\0\0" + jpeg[2:],
    }


@pytest.mark.parametrize("name", damaged())
def test_damaged_metadata_leaves_the_pixels(name: str) -> None:
    data = damaged()[name]
    image = decode_rgb(data)
    assert image.size == upright_size(open_image(data)) == WIDE.size
    whole = encode_image(WIDE.convert("L" if "gray" in name else "RGB"), "JPEG" if "JPEG" in name else "PNG")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(decode_rgb(whole)))


def test_webp_with_damaged_metadata() -> None:
    data = bytearray(encode_image(WIDE, "WEBP", lossless=True, exif=exif(6)))
    place = data.index(b"EXIF") + 8
    data[place : place + 12] = b"\xff" * 12
    image = decode_rgb(bytes(data))
    assert image.size == upright_size(open_image(bytes(data)))


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "TGA", "ICO", "AVIF"]), st.integers(1, 8))
def test_header_and_pixels_agree_on_the_size(kind: str, value: int) -> None:
    if kind not in FORMATS:
        return
    options = {"exif": exif(value)} if kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF") else {}
    data = encode_image(picture(1, (32, 24)), kind, **options)
    assert upright_size(open_image(data)) == decode_rgb(data).size


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_16_bits_a_channel_are_full_depth_or_unknown(mode: str) -> None:
    """As gray ones: values that leave the highest bit unused may be of 10 or 12 bits."""
    import cv2

    ramp = np.tile(np.linspace(0, 1, 64)[:, None], (64, 1, len(mode)))
    full = cv2.imencode(".png", (ramp * 65535).astype(np.uint16))[1].tobytes()
    assert np.asarray(decode_rgb(full)).max() == 255
    twelve = cv2.imencode(".png", (ramp * 4095).astype(np.uint16))[1].tobytes()
    with pytest.raises(ImageRejected, match="unknown_depth"):
        decode_rgb(twelve)
    if mode == "RGB":
        known = np.asarray(decode_rgb(twelve, depth=DepthSettings(bit_depth=12)))
        np.testing.assert_allclose(known[..., 0], ramp[..., 0] * 255, atol=1)


def test_a_declared_range_is_taken() -> None:
    gray = np.tile(np.linspace(0, 4095, 64), (64, 1)).astype(np.uint16)
    declared = encode_image(Image.fromarray(gray), "TIFF", tiffinfo={280: 0, 281: 4095})
    pixels = np.asarray(decode_rgb(declared))
    assert (pixels.min(), pixels.max()) == (0, 255)
    with pytest.raises(ImageRejected, match="unknown_depth"):
        decode_rgb(encode_image(Image.fromarray(gray), "TIFF"))


def test_a_window_cuts_and_holds_what_is_no_number() -> None:
    values = np.array([[-2000.0, -1000.0, 0.0, 1000.0, np.nan, np.inf]] * 8, dtype=np.float32)
    data = encode_image(Image.fromarray(values), "TIFF")
    pixels = np.asarray(decode_rgb(data, depth=DepthSettings(window=(-1000, 1000))))[0, :, 0]
    assert pixels.tolist() == [0, 0, 128, 255, 0, 255]


def test_images_of_which_nothing_is_visible_are_rejected() -> None:
    with pytest.raises(ImageRejected, match="transparent"):
        decode_rgb(encode_image(Image.new("RGBA", (8, 8), (200, 0, 0, 0))))
    undeclared = bytearray(encode_image(Image.new("RGBA", (8, 8), (200, 0, 0, 0)), "TGA"))
    undeclared[17] &= 0xF0  # the fourth byte is no alpha
    assert decode_rgb(bytes(undeclared)).getpixel((0, 0)) == (200, 0, 0)


def test_a_color_key_is_white_in_every_mode() -> None:
    for mode, key in (("L", 7), ("RGB", (255, 0, 255)), ("P", 0), ("1", 0)):
        image = Image.new(mode, (8, 8), key if mode != "1" else 0)
        image.putpixel((7, 7), 1 if mode in ("P", "1") else (1, 2, 3) if mode == "RGB" else 9)
        assert decode_rgb(encode_image(image, "PNG", transparency=key)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((8, 8), 40_000, np.uint16))
    deep.putpixel((7, 7), 65_000)
    info = PngImagePlugin.PngInfo()
    assert decode_rgb(encode_image(deep, "PNG", transparency=40_000, pnginfo=info)).getpixel((0, 0)) == (255, 255, 255)
