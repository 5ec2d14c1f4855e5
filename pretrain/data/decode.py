"""Bytes to RGB pixels, with a named reason for every image that cannot be had."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Image.MAX_IMAGE_PIXELS = None  # the limit is ours, checked before any pixel is decoded

DEFAULT_MAX_PIXELS = 100_000_000
_ORIENTATION = 0x0112  # of EXIF; from 5 on the image lies on its side


# Formats whose decoders are code of Pillow and its libraries; others (EPS) run programs on what they are given.
_TRUSTED = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
Image.init()
FORMATS = tuple(name for name in _TRUSTED if name in Image.OPEN)  # a build of Pillow may lack some


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
}


def open_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Read an image's header and check its size; no pixel is decoded yet.

    Raises:
        ImageRejected: empty, not_an_image, too_many_pixels or undecodable.
    """
    if not data:
        raise ImageRejected("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageRejected("not_an_image") from None
    except Exception:  # a hostile header can raise anything in the format's plug-in
        raise ImageRejected("undecodable") from None
    if image.width * image.height > max_pixels:
        raise ImageRejected("too_many_pixels")
    return image


def decode_rgb(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode to 8-bit RGB, upright.

    Raises:
        ImageRejected: with the reason.
    """
    return decoded(open_image(data, max_pixels))


def decoded(image: Image.Image, shrink: int = 1, grey: bool = False) -> Image.Image:
    """An opened image as 8-bit RGB, upright.

    Grey, palette, CMYK and 16-bit images are converted; transparency is laid on white.

    Args:
        shrink: by what factor it may come out smaller. JPEGs then do, by 2, 4 or 8, for a fraction of the work; other
            formats come whole.
        grey: as 8-bit grey instead; of a JPEG colour is then not even decoded.

    Raises:
        ImageRejected: with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if shrink > 1 or grey:
                image.draft("L" if grey else None, (image.width // shrink, image.height // shrink))
            image.load()
            upright = ImageOps.exif_transpose(image)
            if grey:
                plain = upright.mode == "L" and "transparency" not in upright.info
                return upright if plain else _to_rgb(upright).convert("L")
            return _to_rgb(upright)
    except OSError as error:
        raise ImageRejected("truncated" if "truncated" in str(error) else "undecodable") from None
    except Exception:
        raise ImageRejected("undecodable") from None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image once it is put upright by its EXIF orientation."""
    try:
        turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) >= 5
    except Exception:  # hostile metadata; decoding decides
        turned = False
    return (image.height, image.width) if turned else image.size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):  # 16- and 32-bit grey: Pillow would clip instead of scaling
        values = np.asarray(image, dtype=np.float32)
        largest = 65535.0 if image.mode.startswith("I") and values.max(initial=0) > 255 else values.max(initial=1.0)
        return Image.fromarray((values * (255 / largest)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
