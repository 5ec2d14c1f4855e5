"""The manifest: the commit mark of an artifact and the record of its inputs, settings and files."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from infra.config import Config

Kind = Literal["corpus", "embeddings", "selection", "checkpoint", "backbone", "report"]
SCHEMA = 1


class ArtifactRef(Config):
    """An artifact, or raw data, that another artifact was made from."""

    id: str
    url: str


class FileEntry(Config):
    """One file of an artifact."""

    path: str
    bytes: int
    sha256: str


class Manifest(Config):
    """The commit mark of an artifact and the record of what made it."""

    kind: Kind
    schema_version: int = Field(SCHEMA, alias="schema")
    id: str
    stage: str
    inputs: dict[str, ArtifactRef]
    config: dict[str, Any]
    files: list[FileEntry]
    metrics: dict[str, Any]
    created: str
