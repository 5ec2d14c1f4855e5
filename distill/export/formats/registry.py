"""All formats: how each is written, and the script that loads it with nothing of Fovea."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from distill.config import FormatName
from distill.export.formats import (
    graphs,
    hub_repository,
    official_weights,
    open_clip_folder,
    timm_folder,
    transformers_folder,
)
from distill.export.formats.source import PublishSource
from pretrain.data.config import Views
from pretrain.models.timm_network import Network


@dataclass(frozen=True)
class Format:
    """One way to publish."""

    write: Callable[[PublishSource, Path], None]
    """Adds its files to a directory that holds the timm folder, or nothing yet."""
    check: str | None
    """Script in distill/export/verify_scripts; None where no code but Fovea's reads it here."""
    features: Callable[[PublishSource, Tensor], np.ndarray] = PublishSource.features
    """What the script is to give of normalized images."""
    words: tuple[str, ...] = ()
    """What else the script is given."""


def _of_backbone(write: Callable[[Network, Views, Path], None]) -> Callable[[PublishSource, Path], None]:
    return lambda material, directory: write(material.backbone, material.views, directory)


FORMATS: dict[FormatName, Format] = {
    "timm": Format(_of_backbone(timm_folder.write), "timm_folder.py", PublishSource.tokens),
    "torch_hub": Format(_of_backbone(hub_repository.write), "hub_repository.py"),
    "transformers": Format(_of_backbone(transformers_folder.write), "transformers_folder.py", PublishSource.tokens),
    "open_clip": Format(
        open_clip_folder.write, "open_clip_folder.py", open_clip_folder.features, open_clip_folder.CAPTIONS
    ),
    "onnx": Format(_of_backbone(graphs.write_onnx), "onnx_graph.py"),
    "torch_export": Format(_of_backbone(graphs.write_exported), "exported_graph.py"),
    "official": Format(_of_backbone(official_weights.write), None),
}
"""By name; timm's folder is the first, and others stand on it."""
