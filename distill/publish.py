"""Publish: the released backbone of a checkpoint as a directory that other tools load, checked before it counts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from distill.config import FormatName, PublishConfig, PublishSettings
from distill.formats import official_weights, timm_folder, transformers_folder
from distill.formats.catalogue import FORMATS
from infra.artifacts import Artifact, Input, Plan, produce
from infra.corpora import Corpus
from infra.errors import UserError
from infra.lineage import Ancestor, ancestors
from pretrain.backbones import center_crop
from pretrain.checkpoints import Checkpoint
from pretrain.data.config import Views
from pretrain.data.decode import decode_rgb
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.official import from_official
from pretrain.models.timm_network import Network
from pretrain.models.vit import VisionTransformer

VERSION = 3
_CHECKED_IMAGES = 16


@dataclass(frozen=True)
class Release:
    """All that a published directory is made from."""

    settings: PublishSettings
    checkpoint: Checkpoint
    images: Corpus
    reports: list[Artifact]


def publish(config: PublishConfig) -> Artifact:
    """Write weights in all formats and the model card; return the backbone artifact.

    Raises:
        UserError: an input is missing, or features of a format differ by more than the tolerance.
    """
    from infra.artifacts import open_artifact

    release = Release(
        settings=config,
        checkpoint=Checkpoint.open(config.checkpoint),
        images=Corpus.open(config.images),
        reports=[open_artifact(url, "report") for url in config.reports],
    )
    inputs = {"checkpoint": release.checkpoint.artifact.as_input(), "images": release.images.artifact.as_input()}
    inputs |= {f"report_{i}": report.as_input() for i, report in enumerate(release.reports)}
    settings = config.model_dump(mode="json", exclude={"checkpoint", "images", "reports", "out"})
    plan = Plan("backbone", "publish", VERSION, settings, inputs)
    return produce(plan, config.out, lambda directory: _write(release, inputs, directory))


def _write(release: Release, inputs: dict[str, Input], directory: Path) -> Mapping[str, Any]:
    backbone, views = release.checkpoint.backbone(), release.checkpoint.views
    pixels, differences = _pixels(release.images, backbone, views), dict[str, float]()
    for name in release.settings.formats:
        FORMATS[name].write(backbone, views, directory)
        found = difference(name, directory, backbone, pixels)
        if not found <= release.settings.tolerance:  # also where it is not a number
            raise UserError(f"publish: {name}: features differ by {found:.1e}; raise tolerance only if you know why")
        differences[name] = found
    told = [{"id": each.id, **each.read_json("report.json")} for each in release.reports]
    (directory / "eval.json").write_text(json.dumps(told, indent=1))
    lineage = ancestors(inputs.values())
    (directory / "lineage.json").write_text(json.dumps([each.as_dict() for each in lineage], indent=1))
    (directory / "README.md").write_text(model_card(release, lineage, differences))
    return {"max_abs_diff": differences, "parameters": _parameters(backbone)}


def _parameters(backbone: Network) -> int:
    return sum(value.numel() for value in timm_folder.state_dict(backbone).values())


def _pixels(images: Corpus, backbone: Network, views: Views) -> torch.Tensor:
    """The first images of a corpus, preprocessed and normalised, float32 `[n, 3, side, side]`."""
    count = min(_CHECKED_IMAGES, len(images))
    crops = [center_crop(decode_rgb(images.read_image(row)), backbone.config.image_size) for row in range(count)]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (views.mean, views.std))
    return (pixels - mean) / std


def difference(name: FormatName, directory: Path, backbone: Network, pixels: torch.Tensor) -> float:
    """Largest absolute difference of any feature between Fovea and a format, loaded in a process of its own."""
    with torch.inference_mode():
        ours = backbone([pixels])[0].class_token.numpy()
    script = FORMATS[name].check
    theirs = _by_official_names(directory, backbone, pixels) if script is None else _checked(script, directory, pixels)
    return float(np.abs(ours - theirs).max())


def _checked(script: str, directory: Path, pixels: torch.Tensor) -> np.ndarray:
    """Features by a script of distill/checks."""
    file = Path(__file__).parent / "checks" / script
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch, "pixels.npy"), Path(scratch, "features.npy")
        np.save(inputs, pixels.numpy())
        command = [sys.executable, "-IB", str(file), str(directory.resolve()), str(inputs), str(outputs)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:]
            raise UserError(f"publish: {file.stem}: cannot load the backbone: {''.join(reason)}")
        return np.load(outputs)


def _by_official_names(directory: Path, backbone: Network, pixels: torch.Tensor) -> np.ndarray:
    """Features of the weights under official names, read back: the official code is not to be had here."""
    assert isinstance(backbone, VisionTransformer)
    state = torch.load(directory / official_weights.FILE, weights_only=True)
    again = VisionTransformer(backbone.config).eval()
    again.load_state_dict(from_official(state, backbone.config))
    with torch.inference_mode():
        return again([pixels])[0].class_token.numpy()


def model_card(release: Release, lineage: list[Ancestor], differences: Mapping[str, float]) -> str:
    """The model card, in Markdown with a Hugging Face metadata block."""
    template = resources.files("distill").joinpath("templates/card.md.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    model = release.checkpoint.model
    return environment.from_string(template).render(
        release=release.settings,
        model=model,
        parameters=_parameters(release.checkpoint.backbone()),
        recipe=json.dumps(release.checkpoint.artifact.manifest.config, indent=1),
        training=release.checkpoint.artifact.metrics,
        rows=[row for report in release.reports for row in report.read_json("report.json")["rows"]],
        lineage=lineage,
        differences=differences,
        transformers_class=transformers_folder.family(model) if isinstance(model, VisionTransformerConfig) else "",
    )
