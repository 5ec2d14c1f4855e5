"""Bytes to RGB pixels, with a named reason for every image that cannot be decoded."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from pretrain.data import sample_depth
from pretrain.data.image_metadata import PNG_SIGNATURE, orientation, strip_metadata
from pretrain.data.sample_depth import DepthSettings, UnknownDepth

Image.MAX_IMAGE_PIXELS = None  # the limit is ours, checked before any pixel is decoded

DEFAULT_MAX_PIXELS = 100_000_000
AS_DECLARED = DepthSettings()

# Formats whose decoders are code of Pillow and its libraries; others (EPS) run programs on what they are given.
_TRUSTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
Image.init()
FORMATS = tuple(name for name in _TRUSTED if name in Image.OPEN)  # a build of Pillow may lack some

_ICON = b"\0\0\1\0"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

T = TypeVar("T")


class ImageRejected(Exception):
    """An image that cannot be used. `reason` is one of `REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


REASONS = {
    "empty": "no bytes",
    "not_an_image": "no known image format",
    "too_many_pixels": "more pixels than allowed (a decompression bomb, perhaps)",
    "too_small": "a side shorter than allowed",
    "truncated": "the file ends before the image does",
    "undecodable": "the decoder failed",
    "unknown_depth": "more than 8 bits a sample, and nothing declares which values are black and white",
    "transparent": "no pixel is visible",
}


@dataclass(frozen=True)
class EncodedImage:
    """An image whose header was read; no pixel is decoded yet."""

    header: Image.Image
    data: bytes
    stored_size: tuple[int, int]
    """Width and height of its pixels before they are turned upright."""
    orientation: int
    """EXIF orientation, 1 to 8, that decoding applies."""


def _icon_pixels(data: bytes) -> int:
    """Pixels of the largest image in an icon, whose directory says up to 256 a side whatever its images have."""
    count = int.from_bytes(data[4:6], "little")
    sizes = [_size_in_icon(data, 6 + 16 * number) for number in range(count)]
    return max((width * height for width, height in sizes), default=0)


def _size_in_icon(data: bytes, entry: int) -> tuple[int, int]:
    """Width and height of the image to which an entry of an icon's directory points."""
    start = int.from_bytes(data[entry + 12 : entry + 16], "little")
    content = data[start : start + 32]
    try:
        if content.startswith(PNG_SIGNATURE):
            return struct.unpack(">II", content[16:24])
        width, height = struct.unpack("<ii", content[4:12])
        return abs(width), abs(height) // 2  # a bitmap of twice the height: colors, then the mask
    except struct.error:
        return 0, 0  # decoding will find it truncated


def open_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> EncodedImage:
    """Read an image's header and check its size.

    Raises:
        ImageRejected: empty, not_an_image, too_many_pixels, truncated or undecodable.
    """
    if not data:
        raise ImageRejected("empty")
    if data.startswith(_ICON) and _icon_pixels(data) > max_pixels:  # first: Pillow decodes icons as it opens them
        raise ImageRejected("too_many_pixels")
    header = _despite_metadata(data, _header)
    width, height = header.size
    if width * height > max_pixels:
        raise ImageRejected("too_many_pixels")
    return EncodedImage(header, data, (width, height), orientation(header, data))


def upright_size(image: EncodedImage) -> tuple[int, int]:
    """Width and height of an opened image once it is decoded."""
    width, height = image.stored_size
    return (height, width) if image.orientation >= 5 else (width, height)


def _header(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _despite_metadata(data: bytes, read: Callable[[bytes], T]) -> T:
    """What a reader makes of an image; where it fails, of the image without its metadata, which may be what is damaged.

    Raises:
        ImageRejected: with the reason of the first failure.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(data)
        except ImageRejected:
            raise
        except Exception as error:  # a hostile file can raise anything in the format's plug-in
            reason = _reason(error)
        plain = strip_metadata(data)
        if plain is not None and plain != data:
            try:
                return read(plain)
            except Exception as error:
                reason = _reason(error)
    raise ImageRejected(reason)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not_an_image"
    return "truncated" if isinstance(error, OSError) and "truncated" in str(error) else "undecodable"


def decode_rgb(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS, depth: DepthSettings = AS_DECLARED) -> Image.Image:
    """Decode to 8-bit RGB, upright.

    Raises:
        ImageRejected: with the reason.
    """
    return decode(open_image(data, max_pixels), depth=depth)


def decode(image: EncodedImage, shrink: int = 1, gray: bool = False, depth: DepthSettings = AS_DECLARED) -> Image.Image:
    """An opened image as 8-bit RGB, upright.

    Gray, palette, CMYK and deeper images are converted; transparency is laid on white.

    Args:
        shrink: by what factor it may come out smaller. JPEGs then do, by 2, 4 or 8, for a fraction of the work; other
            formats come whole.
        gray: as 8-bit gray instead; of a JPEG color is then not even decoded.
        depth: what samples of more than 8 bits mean, where the file does not declare it.

    Raises:
        ImageRejected: with the reason.
    """

    def read(data: bytes) -> Image.Image:
        header = image.header if data is image.data else _header(data)
        if shrink > 1 or gray:
            header.draft("L" if gray else None, (header.width // shrink, header.height // shrink))
        header.load()
        return header

    pixels = _despite_metadata(image.data, read)
    try:
        flat = _flatten(pixels, image.data, depth)
        if gray:
            flat = flat.convert("L")
        elif flat.mode != "RGB":
            flat = flat.convert("RGB")
    except UnknownDepth:
        raise ImageRejected("unknown_depth") from None
    except ImageRejected:
        raise
    except Exception:
        raise ImageRejected("undecodable") from None
    turn = _TURNS.get(image.orientation)
    return flat if turn is None else flat.transpose(turn)


def _flatten(image: Image.Image, data: bytes, depth: DepthSettings) -> Image.Image:
    """Pixels of 8 bits without transparency, in some mode."""
    if sample_depth.is_deep_gray(image):
        return _flatten_gray(image, depth)
    if sample_depth.has_16_bit_channels(image, data):
        deep = sample_depth.color_to_8_bits(data, depth)
        if deep is not None:
            return Image.fromarray(deep)
        sample_depth.require_full_depth(np.asarray(image.convert("RGB")))
        if image.info.get("transparency") is not None:  # a color key of 16 bits
            image.info["transparency"] = tuple(each >> 8 for each in image.info["transparency"])
    if image.format == "TGA" and image.mode == "RGBA" and not data[17] & 0x0F:
        return image.convert("RGB")  # a fourth byte that is not declared to be alpha
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _compose_on_white(image.convert("RGBA"))
    return image


def _flatten_gray(image: Image.Image, depth: DepthSettings) -> Image.Image:
    values = np.asarray(image)
    gray = sample_depth.gray_to_8_bits(values, image, depth)
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray = np.where(values == key, np.uint8(255), gray)
    return Image.fromarray(gray)


def _compose_on_white(layer: Image.Image) -> Image.Image:
    lowest, highest = layer.getchannel("A").getextrema()
    if highest == 0:
        raise ImageRejected("transparent")
    if lowest == 255:
        return layer.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
