"""What of a backbone decides an artifact's id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.artifacts.manifest import ArtifactRef
from infra.errors import UserError
from infra.hashing import hash_file, hash_json
from pretrain.backbones import weight_files
from pretrain.backbones.config import (
    BackboneConfig,
    CheckpointBackboneConfig,
    OpenClipBackboneConfig,
    PixelDescriptorConfig,
    TorchHubBackboneConfig,
)
from pretrain.checkpoint.artifact import Checkpoint


def backbone_identity(config: BackboneConfig) -> tuple[dict[str, Any], dict[str, ArtifactRef]]:
    """Settings of a backbone without URLs, and its inputs.

    Raises:
        UserError: the checkpoint or the weights are missing.
    """
    settings = config.model_dump(mode="json", exclude={"url", "checkpoint", "repository"})
    if isinstance(config, OpenClipBackboneConfig):
        settings |= {"preprocessing": weight_files.read_preprocessing(config)}
    if isinstance(config, CheckpointBackboneConfig):
        checkpoint = Checkpoint.open(config.url)
        if config.untrained:  # the same network, whichever training it is the beginning of
            return settings | checkpoint.initial_identity(), {}
        return settings, {"backbone": checkpoint.artifact.as_ref()}
    if isinstance(config, PixelDescriptorConfig):
        return settings, {}
    weights = {"backbone": ArtifactRef(id=_content_hash(weight_files.resolve_weights(config)), url=config.checkpoint)}
    if not isinstance(config, TorchHubBackboneConfig):
        return settings, weights
    return settings, weights | {"code": ArtifactRef(id=_content_hash(Path(config.repository)), url=config.repository)}


def _content_hash(path: Path) -> str:
    """A hash of a checkpoint's bytes: of a file, or of all files of a folder that are neither hidden nor compiled."""
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file() and not _is_ignored(each.relative_to(path)))
        return hash_json([[each.relative_to(path).as_posix(), hash_file(each)] for each in files])
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a checkpoint")
    return hash_file(path)


def _is_ignored(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
