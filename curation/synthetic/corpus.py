"""The synthetic corpus: a small web-like pool with known truth, made from pictures that come with dependencies.

Classes are photographs of scikit-image and scikit-learn. An image is a random crop of one at a random scale, 32x32,
with random tint, gamma, channel order and inversion, so that color alone says nothing. Pool and seed are cut from the
left part of each photograph, the evaluation set from the right part, with no pixel in common.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curation.config import SyntheticSettings
from infra.hashing import hash_json
from infra.progress import progress

SIDE = 32
TRUTH = "truth.json"
_LEFT_SHARE = 0.6
_LEAST_CONTRAST = 0.08
_TRIES = 6
_SMALLEST, _LARGEST = 48, 200  # sides of crops in pixels of the photograph
_VERSION = 1

_SKIMAGE = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cell": "cell.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}
_SKLEARN = {"china": "china.jpg", "flower": "flower.jpg"}


@dataclass(frozen=True)
class PoolImage:
    """One file of the pool and what is known of it."""

    data: bytes
    suffix: str
    kind: str
    """photo, digit, flat, noise or broken"""
    group: int
    """Files of one group are copies of one image."""
    leak: bool = False
    """A copy of an evaluation image."""


def generate(settings: SyntheticSettings, root: Path) -> Path:
    """Write the synthetic corpus below `root` once; return its directory: `pool`, `seed`, `test`, `truth.json`."""
    name = hash_json({"version": _VERSION, **settings.settings()})[:12]
    directory = root / name
    if directory.exists():
        return directory
    partial = root / f"{name}.{os.getpid()}.part"
    shutil.rmtree(partial, ignore_errors=True)
    rng = np.random.Generator(np.random.Philox(settings.seed))
    photographs = load_photographs()
    test = _make_classes(photographs, "right", settings.test_per_class, rng)
    seed = _make_classes(photographs, "left", settings.seed_per_class, rng)
    _write_classes(test, partial / "test")
    _write_classes(seed, partial / "seed")
    _write_pool(_pool(photographs, test, settings, rng), partial, rng)
    partial.rename(directory)
    return directory


def load_photographs() -> dict[str, np.ndarray]:
    """The bundled photographs by name, uint8 RGB."""
    import skimage
    from sklearn.datasets import load_sample_image

    folder = Path(skimage.__file__).parent / "data"
    pictures = {name: np.asarray(Image.open(folder / file).convert("RGB")) for name, file in _SKIMAGE.items()}
    pictures |= {name: np.asarray(load_sample_image(file)) for name, file in _SKLEARN.items()}
    return dict(sorted(pictures.items()))


def crop(photograph: np.ndarray, part: str, rng: np.random.Generator) -> np.ndarray:
    """A random crop of the left or right part of a photograph, recolored, uint8 `[32, 32, 3]`.

    Crops that show next to nothing (open sky, say) are drawn again a few times.
    """
    border = int(photograph.shape[1] * _LEFT_SHARE)
    area = photograph[:, :border] if part == "left" else photograph[:, border:]
    height, width = area.shape[:2]
    longest = min(height, width)
    for _ in range(_TRIES):
        side = int(np.exp(rng.uniform(np.log(min(_SMALLEST, longest)), np.log(min(_LARGEST, longest)))))
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        image = Image.fromarray(area[top : top + side, left : left + side])
        pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)) / 255.0
        if pixels.std(axis=(0, 1)).mean() >= _LEAST_CONTRAST:
            break
    return (_recolor(pixels, rng) * 255).round().astype(np.uint8)


def _recolor(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pixels = pixels ** np.exp(rng.uniform(-0.2, 0.2))
    pixels = np.clip(pixels * rng.uniform(0.85, 1.15, size=3), 0, 1)[..., rng.permutation(3)]
    return 1 - pixels if rng.random() < 0.5 else pixels


def _make_classes(
    photographs: dict[str, np.ndarray], part: str, count: int, rng: np.random.Generator
) -> list[tuple[str, np.ndarray]]:
    return [(name, crop(picture, part, rng)) for name, picture in photographs.items() for _ in range(count)]


def _write_classes(images: list[tuple[str, np.ndarray]], directory: Path) -> None:
    for number, (name, pixels) in enumerate(images):
        path = directory / name / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels))


def encode(pixels: np.ndarray, **options: Any) -> bytes:
    """PNG bytes, or another format by Pillow's options."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def near_copy(pixels: np.ndarray, rng: np.random.Generator) -> tuple[bytes, str]:
    """The image again: as a lossy JPEG, resized, or with its border cut off."""
    how = rng.integers(3)
    if how == 0:
        return encode(pixels, format="JPEG", quality=int(rng.integers(60, 90))), "jpg"
    image = Image.fromarray(pixels)
    if how == 1:
        side = int(rng.integers(24, 49))
        return encode(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))), "png"
    left, top, right, bottom = rng.integers(0, 2, size=4)
    return encode(np.asarray(image.crop((left, top, SIDE - right, SIDE - bottom)))), "png"


def _pool(
    photographs: dict[str, np.ndarray],
    test: list[tuple[str, np.ndarray]],
    settings: SyntheticSettings,
    rng: np.random.Generator,
) -> list[PoolImage]:
    originals = [(pixels, "photo") for _, pixels in _make_classes(photographs, "left", settings.pool_per_class, rng)]
    originals += [(pixels, kind) for kind, pixels in _junk(settings, rng)]
    pool = [PoolImage(encode(pixels), "png", kind, group) for group, (pixels, kind) in enumerate(originals)]
    candidates = [group for group, (_, kind) in enumerate(originals) if kind in ("photo", "digit")]
    for group in rng.choice(candidates, settings.exact_copies):
        pool.append(PoolImage(pool[group].data, "png", originals[group][1], int(group)))
    for group in rng.choice(candidates, settings.near_copies):
        data, suffix = near_copy(originals[group][0], rng)
        pool.append(PoolImage(data, suffix, originals[group][1], int(group)))
    for number, chosen in enumerate(rng.choice(len(test), settings.leaks, replace=False)):
        pixels = test[chosen][1]
        data, suffix = near_copy(pixels, rng) if number % 2 else (encode(pixels), "png")
        pool.append(PoolImage(data, suffix, "photo", len(originals) + number, leak=True))
    broken = _broken(originals[0][0], settings.broken, rng)
    pool += [PoolImage(data, suffix, "broken", -1) for data, suffix in broken]
    return pool


def _junk(settings: SyntheticSettings, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    for digit in digits.images:
        gray = Image.fromarray((digit * (255 / 16)).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        yield "digit", np.asarray(gray.convert("RGB"))
    for _ in range(settings.flat):
        yield "flat", np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (SIDE, SIDE, 3)).copy()
    for _ in range(settings.noise):
        yield "noise", rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def _broken(pixels: np.ndarray, count: int, rng: np.random.Generator) -> Iterator[tuple[bytes, str]]:
    whole = encode(pixels)
    makers = [
        lambda: (b"", "png"),
        lambda: (whole[: int(rng.integers(40, len(whole) - 40))], "png"),
        lambda: (rng.bytes(200), "jpg"),
        lambda: (b"<html>404 Not Found</html>", "jpg"),
        lambda: (_bomb(), "png"),
    ]
    for number in range(count):
        yield makers[number % len(makers)]()


def _bomb() -> bytes:
    """A PNG of a few bytes that claims to be 50,000 pixels wide and high."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def _write_pool(pool: list[PoolImage], directory: Path, rng: np.random.Generator) -> None:
    folder = directory / "pool"
    folder.mkdir(parents=True)
    truth = {}
    order = rng.permutation(len(pool))
    with progress("synthetic corpus", len(pool)) as advance:
        for number, chosen in enumerate(order):
            image = pool[chosen]
            key = f"{number:06d}"
            (folder / f"{key}.{image.suffix}").write_bytes(image.data)
            truth[key] = {"kind": image.kind, "group": image.group, "leak": image.leak}
            advance()
    (directory / TRUTH).write_text(json.dumps(truth, indent=0))
