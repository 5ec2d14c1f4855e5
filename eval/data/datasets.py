"""Datasets by name, made corpora: those of torchvision, and images with maps in folders of their own."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.artifacts.artifact import Artifact, ArtifactSpec, cache_directory, get_or_create
from infra.corpus.writer import CorpusWriter
from infra.errors import UserError
from infra.hashing import hash_file, hash_json
from infra.progress import progress
from pretrain.data.decode import ImageRejected, decode_rgb

VERSION = 1
PAIRED = "map.png"  # what `pairs:` datasets call the map beside an image
_SHARD_BYTES = 256 << 20
_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}

# How each dataset of torchvision is asked for a split; `download` where it can fetch itself.
_SPLITS: dict[str, dict[str, dict[str, Any]]] = {
    **{name: {"train": {"train": True}, "test": {"train": False}} for name in ("CIFAR10", "CIFAR100", "MNIST")},
    **{name: {"train": {"train": True}, "test": {"train": False}} for name in ("FashionMNIST", "KMNIST", "USPS")},
    **{name: {each: {"split": each} for each in ("train", "test")} for name in ("Food101", "SVHN", "StanfordCars")},
    **{name: {each: {"split": each} for each in ("train", "test")} for name in ("GTSRB", "RenderedSST2", "STL10")},
    **{name: {each: {"split": each} for each in ("train", "val", "test")} for name in ("Flowers102", "DTD")},
    **{name: {each: {"split": each} for each in ("train", "val", "test")} for name in ("FGVCAircraft", "PCAM")},
    "OxfordIIITPet": {"train": {"split": "trainval"}, "test": {"split": "test"}},
    "Country211": {each: {"split": each} for each in ("train", "valid", "test")},
    "Imagenette": {each: {"split": each} for each in ("train", "val")},
    "ImageNet": {each: {"split": each} for each in ("train", "val")},
    "Caltech101": {"all": {}},
    "EuroSAT": {"all": {}},
    "SUN397": {"all": {}},
}
_NOT_FETCHED = {"ImageNet", "StanfordCars"}


def is_named(url: str) -> bool:
    """Whether a dataset is given by name, and not by where it lies."""
    return url.startswith(("torchvision:", "pairs:"))


def ingest_named(name: str, out: str) -> Artifact:
    """The corpus of a named dataset.

    Args:
        name: `torchvision:NAME/SPLIT`, or `torchvision:NAME/SPLIT@FOLDER` where its files lie; `pairs:IMAGES:MAPS` for
            two folders with files of the same names.

    Raises:
        UserError: there is none of this name, or it cannot be fetched.
    """
    kind, _, rest = name.partition(":")
    return _open_torchvision(name, rest, out) if kind == "torchvision" else _open_pairs(name, rest, out)


@dataclass(frozen=True)
class _Sample:
    key: str
    members: dict[str, bytes]
    image: str
    size: tuple[int, int]
    label: int | None


@dataclass(frozen=True)
class NamedDataset:
    """The samples of a dataset."""

    title: str
    samples: Iterator[_Sample]
    total: int
    classes: list[str]
    rejected: dict[str, int]

    def write(self, directory: Path) -> Mapping[str, Any]:
        """Make a corpus of them."""
        writer = CorpusWriter(directory, _SHARD_BYTES)
        with progress(self.title, self.total) as advance:
            for each in self.samples:
                digest = hashlib.sha256(each.members[each.image]).hexdigest()
                row = {"sha256": digest, "label": each.label, "caption": None}
                width, height = each.size
                writer.add(each.key, each.members, each.image, {"width": width, "height": height, **row})
                advance()
        writer.finish()
        return {"images": self.total, "classes": self.classes, "rejected": self.rejected}


def _open_torchvision(name: str, rest: str, out: str) -> Artifact:
    place, _, folder = rest.partition("@")
    dataset_name, _, split = place.partition("/")
    if dataset_name not in _SPLITS:
        raise UserError(f"{name}: no such dataset; there are {', '.join(sorted(_SPLITS))}")
    options = _SPLITS[dataset_name].get(split)
    if options is None:
        raise UserError(
            f"{name}: has the splits {', '.join(_SPLITS[dataset_name])}; write torchvision:{dataset_name}/SPLIT"
        )
    dataset = _open_dataset(name, dataset_name, options, Path(folder) if folder else cache_directory() / "torchvision")
    found = NamedDataset(f"{dataset_name} {split}", _samples(dataset), len(dataset), _class_names(dataset), {})
    import torchvision

    settings: dict[str, Any] = {"dataset": dataset_name, "split": split, "torchvision": torchvision.__version__}
    settings |= {"images": len(dataset), "files": _listed(Path(folder)) if folder else None}
    return get_or_create(ArtifactSpec("corpus", "torchvision", VERSION, settings), out, found.write)


def _open_dataset(name: str, dataset: str, options: dict[str, Any], folder: Path) -> Any:
    from torchvision import datasets

    fetch = {} if dataset in _NOT_FETCHED else {"download": True}
    try:
        return getattr(datasets, dataset)(str(folder), **options, **fetch)
    except (OSError, RuntimeError) as error:  # among them every trouble of the network
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}: cannot be had ({reason[0]}); put torchvision's files below {folder}") from None


def _listed(folder: Path) -> str:
    """A hash of names and sizes of all files of a folder: torchvision checks what it fetches, but not what it finds."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hash_json([[path.relative_to(folder).as_posix(), path.stat().st_size] for path in files])


def _class_names(dataset: Any) -> list[str]:
    """Names of classes, made different where torchvision has two of one name."""
    given = getattr(dataset, "classes", getattr(dataset, "categories", []))
    names = [each[0] if isinstance(each, tuple) else str(each) for each in given]
    return [name if names.count(name) == 1 else f"{name} {number}" for number, name in enumerate(names)]


def _samples(dataset: Any) -> Iterator[_Sample]:
    for number in range(len(dataset)):
        image, label = dataset[number]
        buffer = io.BytesIO()
        image = image.convert("RGB")
        image.save(buffer, "PNG")
        yield _Sample(f"{number:08d}", {"png": buffer.getvalue()}, "png", image.size, int(label))


def _open_pairs(name: str, rest: str, out: str) -> Artifact:
    images, colon, maps = rest.partition(":")
    folders = [Path(images), Path(maps)]
    if not colon or not all(each.is_dir() for each in folders):
        raise UserError(f"{name}: give two folders of this machine, as pairs:IMAGES:MAPS")
    pairs = _matched(name, *folders)
    files = [[key, hash_file(image), hash_file(beside)] for key, image, beside in pairs]
    plan = ArtifactSpec("corpus", "pairs", VERSION, {"files": hash_json(files)})
    unpaired = len(_files(folders[0], _IMAGES)) - len(pairs)
    return get_or_create(plan, out, NamedDataset("pairs", _read(pairs), len(pairs), [], {"unpaired": unpaired}).write)


def _matched(name: str, images: Path, maps: Path) -> list[tuple[str, Path, Path]]:
    """Key, image and map of each pair: their paths below the two folders are the same, but for the extension."""
    beside = {path.relative_to(maps).with_suffix("").as_posix(): path for path in _files(maps, {".png"})}
    found: list[tuple[str, Path, Path]] = []
    for path in _files(images, _IMAGES):
        stem = path.relative_to(images).with_suffix("").as_posix()
        if stem in beside:
            found.append((stem.replace(".", "_"), path, beside[stem]))  # in shards a key ends at its first dot
    keys = [key for key, _, _ in found]
    if twice := {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else set():
        raise UserError(f"{name}: there are several images {min(twice)}; keep one of each name")
    if not found:
        raise UserError(f"{name}: no image has a PNG of the same name beside it in {maps}; check the folders")
    return found


def _files(folder: Path, suffixes: set[str]) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in suffixes)


def _read(pairs: list[tuple[str, Path, Path]]) -> Iterator[_Sample]:
    for key, image, beside in pairs:
        data, extension = image.read_bytes(), image.suffix[1:].lower()
        try:
            size = decode_rgb(data).size
        except ImageRejected as error:
            raise UserError(f"{image}: {error.reason}; fix or remove it") from None
        yield _Sample(key, {extension: data, PAIRED: beside.read_bytes()}, extension, size, None)
