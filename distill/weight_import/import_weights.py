"""Import: weights of the official DINOv2 and DINOv3 code, timm or open_clip to a checkpoint to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.config import ImportConfig
from infra.artifacts.artifact import Artifact, ArtifactSpec, get_or_create
from infra.artifacts.manifest import ArtifactRef
from infra.errors import UserError
from infra.hashing import hash_file
from infra.notices import print_loading

VERSION = 3


def import_weights(config: ImportConfig) -> Artifact:
    """Write a checkpoint whose student and teacher are the given weights; heads it has none, but open_clip's towers.

    Raises:
        UserError: the file is missing, or of another model than the settings say.
    """

    def write(directory: Path) -> Mapping[str, Any]:
        print_loading("import", "torch")
        from distill.weight_import.convert import write_checkpoint

        return write_checkpoint(config, directory)

    return get_or_create(checkpoint_spec(config), config.out, write, restart=config.restart)


def checkpoint_spec(config: ImportConfig) -> ArtifactSpec:
    """The checkpoint that a configuration asks for.

    Raises:
        UserError: the file is missing.
    """
    path = Path(config.checkpoint)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of weights")
    settings = config.model_dump(mode="json", exclude={"checkpoint", "out", "restart"})
    source = {"weights": ArtifactRef(id=hash_file(path), url=config.checkpoint)}
    return ArtifactSpec("checkpoint", "import", VERSION, settings, source)
