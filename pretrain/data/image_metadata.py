"""Metadata of encoded images: the orientation that it asks for, and images without it where it is damaged."""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image

UPRIGHT = 1
ORIENTATION_TAG = 0x0112  # of EXIF and TIFF; 5 to 8 exchange width and height
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation\s*(?:=\s*["']|>)\s*([1-8])\b""")
_XMP_KEYWORD = b"XML:com.adobe.xmp"
_RAW_EXIF_KEYWORD = b"Raw profile type exif"
_MOST_TEXT = 1 << 20  # bytes of a compressed text that are unpacked
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_WEBP_DROPPED = {b"EXIF", b"XMP ", b"ICCP"}
_WEBP_FLAGS = 0x20 | 0x08 | 0x04  # of VP8X: ICC profile, EXIF, XMP
_JPEG_KEPT = {0xE0, 0xEE}  # JFIF and Adobe say how colors are stored


def orientation(image: Image.Image, data: bytes) -> int:
    """The orientation (EXIF, 1 to 8) that is still to be applied once an opened image is decoded.

    EXIF comes before XMP, wherever either stands in the file. Values outside 1 to 8 and damaged metadata count as
    upright. No pixel is decoded.

    Args:
        image: opened, not decoded. Of a TIFF, XMP is removed, for Pillow would apply it while decoding.
        data: the encoded image.
    """
    blocks: list[bytes] = []
    if image.format == "PNG":
        blocks, texts = _png_metadata(data)
    elif image.format == "TIFF":
        texts = _bytes(image.info.pop("xmp", None))
        if ORIENTATION_TAG in image.tag_v2:  # type: ignore[attr-defined]
            return UPRIGHT  # Pillow turns it while decoding, and its opened image has the size that it will have
    else:
        blocks, texts = (_bytes(image.info.get(name)) for name in ("exif", "xmp"))
    for block in blocks:
        value = _exif_orientation(block)
        if value is not None:
            return value if 1 <= value <= 8 else UPRIGHT
    return _xmp_orientation(texts)


def _bytes(value: object) -> list[bytes]:
    return [value] if isinstance(value, bytes) else []


def _exif_orientation(block: bytes) -> int | None:
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif.load(block)
            value = exif.get(ORIENTATION_TAG)
    except Exception:  # damaged metadata can raise anything
        return None
    return value if isinstance(value, int) else None


def _xmp_orientation(texts: list[bytes]) -> int:
    for text in texts:
        if match := _XMP_ORIENTATION.search(text):
            return int(match[1])
    return UPRIGHT


def _png_metadata(data: bytes) -> tuple[list[bytes], list[bytes]]:
    """EXIF blocks and XMP texts of a PNG: eXIf chunks, then raw EXIF texts, before or behind the pixels."""
    blocks: list[bytes] = []
    raw: list[bytes] = []
    texts: list[bytes] = []
    for kind, content, _ in _png_chunks(data):
        if kind == b"eXIf":
            blocks.append(content)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, rest = content.partition(b"\0")
            if keyword == _XMP_KEYWORD and kind == b"iTXt":
                texts.append(_international_text(rest))
            elif keyword == _RAW_EXIF_KEYWORD:
                raw.append(_hexadecimal_profile(rest if kind == b"tEXt" else _decompress(rest[1:])))
    return blocks + [each for each in raw if each], texts


def _international_text(rest: bytes) -> bytes:
    """The text of an iTXt chunk, behind compression flag and method, language and translated keyword."""
    compressed, fields = rest[:1] == b"\1", rest[2:].split(b"\0", 2)
    text = fields[2] if len(fields) == 3 else b""
    return _decompress(text) if compressed else text


def _hexadecimal_profile(text: bytes) -> bytes:
    """A raw profile as ImageMagick writes it: a line break, its name, its length, lines of hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


def _decompress(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _MOST_TEXT)
    except zlib.error:
        return b""


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Kind, content and whole bytes of each chunk of a PNG; the last one may be cut short."""
    start = len(PNG_SIGNATURE)
    while start + 8 <= len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        end = start + 12 + length
        yield data[start + 4 : start + 8], data[start + 8 : end - 4], data[start:end]
        start = end


def strip_metadata(data: bytes) -> bytes | None:
    """An encoded PNG, WebP or JPEG again, with nothing but what its pixels need; None for other formats."""
    if data.startswith(PNG_SIGNATURE):
        return _strip_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _strip_webp(data)
    if data.startswith(b"\xff\xd8"):
        return _strip_jpeg(data)
    return None


def _strip_png(data: bytes) -> bytes:
    chunks = list(_png_chunks(data))
    color_type = next((content[9] for kind, content, _ in chunks if kind == b"IHDR" and len(content) > 9), None)
    shortest = {0: 2, 2: 6}.get(-1 if color_type is None else color_type, 0)  # bytes of a color key

    def is_kept(kind: bytes, content: bytes) -> bool:
        return kind in _PNG_KEPT and (kind != b"tRNS" or len(content) >= shortest)

    return PNG_SIGNATURE + b"".join(whole for kind, content, whole in chunks if is_kept(kind, content))


def _strip_webp(data: bytes) -> bytes:
    kept = bytearray()
    start = 12
    while start + 8 <= len(data):
        kind, length = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        end = start + 8 + length + length % 2
        if kind not in _WEBP_DROPPED:
            chunk = bytearray(data[start:end])
            if kind == b"VP8X" and len(chunk) > 8:
                chunk[8] &= ~_WEBP_FLAGS
            kept += chunk
        start = end
    return b"RIFF" + (len(kept) + 4).to_bytes(4, "little") + b"WEBP" + bytes(kept)


def _strip_jpeg(data: bytes) -> bytes:
    """Segments up to the first scan, but for application data and comments; then everything as it is."""
    kept = bytearray(data[:2])
    start = 2
    while start + 4 <= len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if marker == 0xFF:  # a fill byte
            start += 1
            continue
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == 0xDA:
            break
        is_metadata = (0xE0 <= marker <= 0xEF and marker not in _JPEG_KEPT) or marker == 0xFE
        if not is_metadata:
            kept += data[start:end]
        start = end
    return bytes(kept) + data[start:]
