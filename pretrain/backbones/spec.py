"""Backbones by one word, as they are named on a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from infra.artifacts.artifact import find
from infra.errors import UserError
from infra.storage import filesystem
from pretrain.backbones.config import PRETRAINED

FORMS = (
    "URL of a checkpoint or published backbone, pixels, timm:NAME[@FILE], open_clip:MODEL/TAG, open_clip:MODEL@FILE, "
    "transformers:OWNER/NAME, a folder of transformers, torch_hub:FOLDER:ENTRY@FILE, or torchscript:FILE"
)


def parse_backbone(name: str) -> dict[str, Any]:
    """Settings of the backbone that a word names.

    Raises:
        UserError: it names none.
    """
    kind, colon, rest = name.partition(":")
    if name == "pixels":
        return {"kind": "pixels", "side": 32, "frequencies": 32, "whiten": 0.0}
    if colon and kind in _KINDS:
        return {"kind": kind, **_KINDS[kind](rest)}
    artifact = find(name)
    if artifact is not None and artifact.manifest.kind == "checkpoint":
        return {"kind": "checkpoint", "url": name}
    folder = filesystem.local_path(name) if filesystem.is_local(name) else None
    if folder is not None and (folder / "config.json").is_file():
        return _parse_folder(folder)
    raise UserError(f"{name}: no backbone by this name; give {FORMS}")


def _parse_folder(folder: Path) -> dict[str, Any]:
    """What `save_pretrained` of transformers or timm's format left."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        config = {}
    if isinstance(config, dict) and isinstance(config.get("architecture"), str):
        return {"kind": "timm", "model": config["architecture"], "checkpoint": str(folder)}
    if isinstance(config, dict) and "model_type" in config:
        return {"kind": "transformers", "checkpoint": str(folder)}
    raise UserError(f"{folder}: its config.json is neither timm's nor transformers'; name the model another way")


def _parse_timm(rest: str) -> dict[str, Any]:
    model, _, file = rest.partition("@")
    return {"model": model, "checkpoint": file or PRETRAINED}


def _parse_open_clip(rest: str) -> dict[str, Any]:
    model, at, file = rest.partition("@")
    if not at:
        model, slash, file = rest.rpartition("/")
        if not slash:
            raise UserError(f"open_clip:{rest}: say which weights, as open_clip:MODEL/TAG or open_clip:MODEL@FILE")
    return {"model": model, "checkpoint": file}


def _parse_torch_hub(rest: str) -> dict[str, Any]:
    place, at, file = rest.partition("@")
    folder, colon, entry = place.rpartition(":")
    if not at or not colon:
        raise UserError(f"torch_hub:{rest}: say which entry point and weights, as torch_hub:FOLDER:ENTRY@FILE")
    return {"repository": folder, "model": entry, "checkpoint": file}


def _parse_file(rest: str) -> dict[str, Any]:
    return {"checkpoint": rest}


_KINDS = {
    "timm": _parse_timm,
    "open_clip": _parse_open_clip,
    "transformers": _parse_file,
    "torch_hub": _parse_torch_hub,
    "torchscript": _parse_file,
}
