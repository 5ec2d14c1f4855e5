"""Publish: the released backbone of a checkpoint as a directory that other tools load, checked before it counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.config import FormatName, PublishConfig, PublishSettings
from distill.export import upload
from distill.export.formats.compatibility import incompatibility, require_compatible
from infra.artifacts.artifact import Artifact, ArtifactSpec, find_existing, get_or_create, open_artifact
from infra.errors import UserError
from infra.notices import print_loading
from pretrain.checkpoint.artifact import Checkpoint

VERSION = 5
_PLACES = {"checkpoint", "images", "reports", "hf_repo", "hf_private", "out", "restart"}
_USUAL: tuple[FormatName, ...] = ("timm", "torch_hub", "official")


def publish(config: PublishConfig) -> Artifact:
    """Write weights in all formats and the model card, then move the pointer; return the backbone artifact.

    Raises:
        UserError: an input is missing, a format cannot hold the backbone, or its features differ by more than the
            tolerance.
    """
    plan = backbone_spec(config)
    new = find_existing(plan, config.out) is None

    def write(directory: Path) -> Mapping[str, Any]:
        print_loading("publish", "torch")
        from distill.export.release import ReleaseInputs, write_release

        return write_release(ReleaseInputs.open(config, plan.settings["formats"]), plan.inputs, directory)

    artifact = get_or_create(plan, config.out, write, restart=config.restart)
    if config.hf_repo is not None:
        upload.upload(artifact, config.hf_repo, config.hf_private)
    if new:
        upload.write_pointer(artifact, config.name)
    return artifact


def backbone_spec(config: PublishConfig) -> ArtifactSpec:
    """The published backbone that a configuration asks for.

    Raises:
        UserError: an input is missing, or a format cannot hold the backbone.
    """
    checkpoint = Checkpoint.open(config.checkpoint)
    inputs = {"checkpoint": checkpoint.artifact.as_ref(), "images": open_artifact(config.images, "corpus").as_ref()}
    reports = [open_artifact(url, "report") for url in config.reports]
    inputs |= {f"report_{i}": report.as_ref() for i, report in enumerate(reports)}
    settings = config.model_dump(mode="json", exclude=_PLACES) | {"formats": resolve_formats(config, checkpoint)}
    return ArtifactSpec("backbone", "publish", VERSION, settings, inputs)


def resolve_formats(settings: PublishSettings, checkpoint: Checkpoint) -> list[FormatName]:
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
