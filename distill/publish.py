"""Publish: the released backbone of a checkpoint as a directory that other tools load, checked before it counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill import destinations
from distill.config import FormatName, PublishConfig, PublishSettings
from distill.formats.compatibility import incompatibility, require_compatible
from infra.artifacts import Artifact, ArtifactSpec, find_existing, open_artifact, produce
from infra.errors import UserError
from infra.notices import say_loading
from pretrain.checkpoints import Checkpoint

VERSION = 4
_PLACES = {"checkpoint", "images", "reports", "hub", "hub_private", "out", "restart"}
_USUAL: tuple[FormatName, ...] = ("timm", "hub", "official")


def publish(config: PublishConfig) -> Artifact:
    """Write weights in all formats and the model card, then move the pointer; return the backbone artifact.

    Raises:
        UserError: an input is missing, a format cannot hold the backbone, or its features differ by more than the
            tolerance.
    """
    plan = backbone_spec(config)
    new = find_existing(plan, config.out) is None

    def write(directory: Path) -> Mapping[str, Any]:
        say_loading("publish", "torch")
        from distill.release import Release, write_release

        return write_release(Release.open(config, plan.settings["formats"]), plan.inputs, directory)

    artifact = produce(plan, config.out, write, restart=config.restart)
    if config.hub is not None:
        destinations.upload(artifact, config.hub, config.hub_private)
    if new:
        destinations.point_to(artifact, config.name)
    return artifact


def backbone_spec(config: PublishConfig) -> ArtifactSpec:
    """The published backbone that a configuration asks for.

    Raises:
        UserError: an input is missing, or a format cannot hold the backbone.
    """
    checkpoint = Checkpoint.open(config.checkpoint)
    inputs = {"checkpoint": checkpoint.artifact.as_input(), "images": open_artifact(config.images, "corpus").as_input()}
    reports = [open_artifact(url, "report") for url in config.reports]
    inputs |= {f"report_{i}": report.as_input() for i, report in enumerate(reports)}
    settings = config.model_dump(mode="json", exclude=_PLACES) | {"formats": formats_of(config, checkpoint)}
    return ArtifactSpec("backbone", "publish", VERSION, settings, inputs)


def formats_of(settings: PublishSettings, checkpoint: Checkpoint) -> list[FormatName]:
    """The formats that are asked for, or those of the usual ones that can hold the backbone.

    Raises:
        UserError: one that is asked for cannot hold it, or no usual one can.
    """
    model, objectives = checkpoint.model, checkpoint.description.objectives
    wanted = settings.formats
    if wanted is None:
        wanted = [name for name in _USUAL if incompatibility(name, model, objectives) is None]
        if not wanted:
            raise UserError(f"formats: {incompatibility('timm', model, objectives)}; name other formats")
    for name in wanted:
        require_compatible(name, model, objectives)
    return wanted
