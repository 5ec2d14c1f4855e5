"""What of a backbone decides an artifact's id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.artifacts import Input
from infra.errors import UserError
from infra.hashing import hash_file, hash_json
from pretrain import published
from pretrain.checkpoints import Checkpoint
from pretrain.config import BackboneConfig, CheckpointBackbone, OpenClipBackbone, PixelDescriptor, TorchHubBackbone


def identity(config: BackboneConfig) -> tuple[dict[str, Any], dict[str, Input]]:
    """Settings of a backbone without URLs, and its inputs.

    Raises:
        UserError: the checkpoint or the weights are missing.
    """
    settings = config.model_dump(mode="json", exclude={"url", "checkpoint", "repository"})
    if isinstance(config, OpenClipBackbone):
        settings |= {"preprocessing": published.preprocessing(config)}
    if isinstance(config, CheckpointBackbone):
        checkpoint = Checkpoint.open(config.url)
        if config.untrained:  # the same network, whichever training it is the beginning of
            return settings | checkpoint.initial_identity(), {}
        return settings, {"backbone": checkpoint.artifact.as_input()}
    if isinstance(config, PixelDescriptor):
        return settings, {}
    weights = {"backbone": Input(id=_content_hash(published.path(config)), url=config.checkpoint)}
    if not isinstance(config, TorchHubBackbone):
        return settings, weights
    return settings, weights | {"code": Input(id=_content_hash(Path(config.repository)), url=config.repository)}


def _content_hash(path: Path) -> str:
    """A hash of a checkpoint's bytes: of a file, or of all files of a folder that are neither hidden nor compiled."""
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file() and not _passed_over(each.relative_to(path)))
        return hash_json([[each.relative_to(path).as_posix(), hash_file(each)] for each in files])
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a checkpoint")
    return hash_file(path)


def _passed_over(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
