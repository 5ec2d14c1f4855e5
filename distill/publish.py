"""Publish: the released backbone of a checkpoint as a directory that other tools load, checked before it counts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill import destinations
from distill.card import model_card, parameters_of
from distill.checking import difference, pixels_of
from distill.config import FormatName, PublishConfig, PublishSettings
from distill.formats.catalogue import FORMATS
from distill.formats.material import Material
from distill.preparation import FILE, processor
from distill.provenance import public
from infra.artifacts import Artifact, Input, Plan, find_planned, open_artifact, produce
from infra.corpora import Corpus
from infra.errors import UserError
from infra.lineage import ancestors
from pretrain.checkpoints import Checkpoint
from pretrain.models.config import TimmNetworkConfig

VERSION = 4
_PLACES = {"checkpoint", "images", "reports", "hub", "hub_private", "out", "restart"}


@dataclass(frozen=True)
class Release:
    """All that a published directory is made from."""

    settings: PublishSettings
    formats: list[FormatName]
    checkpoint: Checkpoint
    images: Corpus
    reports: list[Artifact]


def publish(config: PublishConfig) -> Artifact:
    """Write weights in all formats and the model card, then move the pointer; return the backbone artifact.

    Raises:
        UserError: an input is missing, or features of a format differ by more than the tolerance.
    """
    checkpoint = Checkpoint.open(config.checkpoint)
    release = Release(
        settings=config,
        formats=formats_of(config, checkpoint),
        checkpoint=checkpoint,
        images=Corpus.open(config.images),
        reports=[open_artifact(url, "report") for url in config.reports],
    )
    inputs = {"checkpoint": release.checkpoint.artifact.as_input(), "images": release.images.artifact.as_input()}
    inputs |= {f"report_{i}": report.as_input() for i, report in enumerate(release.reports)}
    settings = config.model_dump(mode="json", exclude=_PLACES) | {"formats": release.formats}
    plan = Plan("backbone", "publish", VERSION, settings, inputs)
    new = find_planned(plan, config.out) is None
    artifact = produce(plan, config.out, lambda directory: _write(release, inputs, directory), restart=config.restart)
    if config.hub is not None:
        destinations.upload(artifact, config.hub, config.hub_private)
    if new:
        destinations.point_to(artifact, config.name)
    return artifact


def formats_of(settings: PublishSettings, checkpoint: Checkpoint) -> list[FormatName]:
    """The formats that are asked for, or those that fit."""
    if settings.formats is not None:
        return settings.formats
    return ["timm", "hub"] if isinstance(checkpoint.model, TimmNetworkConfig) else ["timm", "hub", "official"]


def _write(release: Release, inputs: dict[str, Input], directory: Path) -> Mapping[str, Any]:
    material = Material.of(release.checkpoint)
    pixels, differences = pixels_of(release.images, material), dict[str, float]()
    for name in release.formats:
        FORMATS[name].write(material, directory)
        found = difference(name, directory, material, pixels)
        if not found <= release.settings.tolerance:  # also where it is not a number
            raise UserError(f"publish: {name}: features differ by {found:.1e}; raise tolerance only if you know why")
        differences[name] = found
    told = [{"id": each.id, **each.read_json("report.json")} for each in release.reports]
    (directory / "eval.json").write_text(json.dumps(told, indent=1))
    side = material.backbone.config.image_size
    (directory / FILE).write_text(json.dumps(processor(side, material.views), indent=2))
    lineage = [replace(each, url=public(each.url)) for each in ancestors(inputs.values())]
    (directory / "lineage.json").write_text(json.dumps([each.as_dict() for each in lineage], indent=1))
    card = model_card(release.settings, release.checkpoint, material.backbone, told, lineage, differences)
    (directory / "README.md").write_text(card)
    return {"max_abs_diff": differences, "parameters": parameters_of(material.backbone)}
