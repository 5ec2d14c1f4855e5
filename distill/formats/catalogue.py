"""All formats: how each is written, and the script that loads it with nothing of Fovea."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distill.config import FormatName
from distill.formats import graphs, hub_repository, official_weights, timm_folder, transformers_folder
from pretrain.data.config import Views
from pretrain.models.timm_network import Network


@dataclass(frozen=True)
class Format:
    """One way to publish."""

    write: Callable[[Network, Views, Path], None]
    """Adds its files to a directory that holds the timm folder, or nothing yet."""
    check: str | None
    """Script in distill/checks; None where no code but Fovea's reads it here."""


FORMATS: dict[FormatName, Format] = {
    "timm": Format(timm_folder.write, "timm_folder.py"),
    "hub": Format(hub_repository.write, "hub_repository.py"),
    "transformers": Format(transformers_folder.write, "transformers_folder.py"),
    "onnx": Format(graphs.write_onnx, "onnx_graph.py"),
    "torch_export": Format(graphs.write_exported, "exported_graph.py"),
    "official": Format(official_weights.write, None),
}
"""By name; timm's folder is the first, and others stand on it."""
