"""What teachers say of views that come again, kept as an artifact: they run once, whoever learns from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.artifacts.artifact import Artifact, ArtifactSpec, get_or_create
from infra.errors import UserError
from infra.progress import progress
from infra.storage.atomic import atomic_write
from pretrain.data.loader import Batch, ViewDataset
from pretrain.models.vit import Features

VERSION = 1
_LAYOUT = "layout.json"
_PART = 1024  # views in a file
_BATCH = 32  # views that teachers see at a time
_OPEN = 256  # files that stay mapped: each takes a descriptor
_TOKENS = ("class", "patch")

ComputeFeatures = Callable[[Batch], Mapping[str, Features]]
"""Gives what all teachers say of the global crops of a batch."""


@dataclass(frozen=True)
class TeacherWidths:
    """Of a teacher's tokens."""

    embed_dim: int
    patch_dim: int


@dataclass(frozen=True)
class TeacherCache:
    """Features of all views, by teacher and key, float16 on disk: mapped, not read."""

    artifact: Artifact

    @cached_property
    def _layout(self) -> dict[str, Any]:
        layout: dict[str, Any] = self.artifact.read_json(_LAYOUT)
        return layout

    @property
    def teachers(self) -> dict[str, TeacherWidths]:
        """Names and widths."""
        return {name: TeacherWidths(*widths) for name, widths in self._layout["teachers"].items()}

    def features(self, teacher: str, keys: Tensor, device: torch.device) -> Features:
        """What a teacher said of the global crops of some keys `[B]`, crop by crop, float32."""
        found = [self._read_rows(f"{teacher}-{kind}", keys.cpu().numpy()).to(device) for kind in _TOKENS]
        return Features(*(each.float().transpose(0, 1).flatten(0, 1) for each in found))

    def _read_rows(self, name: str, keys: np.ndarray) -> Tensor:
        rows = [self._open_part(name, int(key) // _PART)[int(key) % _PART] for key in keys]
        return torch.from_numpy(np.stack(rows))

    def _open_part(self, name: str, number: int) -> np.ndarray:
        file = _file(name, number)
        found = self._map_part.pop(file, None)
        if found is None:
            found = np.load(self.artifact.local_file(file), mmap_mode="r", allow_pickle=False)
        self._map_part[file] = found
        if len(self._map_part) > _OPEN:
            del self._map_part[next(iter(self._map_part))]
        return found

    @cached_property
    def _map_part(self) -> dict[str, np.ndarray]:
        """The files that were read last, the oldest first."""
        return {}


def get_or_create_cache(
    spec: ArtifactSpec, out: str, dataset: ViewDataset, compute: Callable[[], ComputeFeatures]
) -> TeacherCache:
    """Ask teachers about all views of a dataset that come again, unless that has been done.

    Args:
        ask: loads the teachers; called only if they are needed.

    Raises:
        UserError: a teacher says what float16 cannot hold.
    """
    return TeacherCache(get_or_create(spec, out, lambda directory: _write(dataset, compute(), directory), ["*-*.npy"]))


def _write(dataset: ViewDataset, compute: ComputeFeatures, directory: Path) -> Mapping[str, Any]:
    """Parts that appear when they are whole; what a killed attempt left is gone on from."""
    views = dataset.samples.size * dataset.repeats
    parts = [range(first, min(first + _PART, views)) for first in range(0, views, _PART)]
    asked = compute(dataset.batch_of_keys(np.arange(1)))
    widths = {name: (said.class_token.shape[1], said.patch_tokens.shape[2]) for name, said in asked.items()}
    last = [f"{name}-{_TOKENS[-1]}" for name in widths][-1]
    done = sum(len(part) for number, part in enumerate(parts) if (directory / _file(last, number)).exists())
    with progress("teacher cache", views, done) as advance:
        for number, part in enumerate(parts):
            if not (directory / _file(last, number)).exists():
                _write_part(dataset, compute, part, number, directory, advance)
    (directory / _LAYOUT).write_text(json.dumps({"teachers": widths, "views": views}))
    return {"images": dataset.samples.size, "views": views, "teachers": list(widths)}


def _write_part(
    dataset: ViewDataset,
    compute: ComputeFeatures,
    part: range,
    number: int,
    directory: Path,
    advance: Callable[[int], None],
) -> None:
    found: dict[str, list[np.ndarray]] = {}
    for first in range(part.start, part.stop, _BATCH):
        keys = np.arange(first, min(first + _BATCH, part.stop))
        for name, said in compute(dataset.batch_of_keys(keys)).items():
            for kind, tokens in zip(_TOKENS, (said.class_token, said.patch_tokens), strict=True):
                by_view = tokens.unflatten(0, (-1, len(keys))).transpose(0, 1)
                found.setdefault(f"{name}-{kind}", []).append(_to_float16(by_view, name))
        advance(len(keys))
    for name, pieces in found.items():
        with atomic_write(directory / _file(name, number), 0o644) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(pieces))


def _to_float16(tokens: Tensor, teacher: str) -> np.ndarray:
    halved = tokens.half().cpu()
    if not halved.isfinite().all():
        raise UserError(
            f"num_cached_views: teacher {teacher} gives values beyond float16; set it to 0, or use another teacher"
        )
    return halved.numpy()


def _file(name: str, number: int) -> str:
    return f"{name}-{number:05d}.npy"
