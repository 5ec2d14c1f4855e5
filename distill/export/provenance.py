"""Where a backbone comes from, for its card: sources, funnel, licenses, compute."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from infra.artifacts.artifact import Artifact, find
from infra.corpus.corpus import Corpus
from infra.corpus.json_metadata import read_json_values
from infra.corpus.selection import Step, read_steps
from infra.storage import filesystem
from pretrain.planning import hardware

_SAMPLE = 2000  # images of a corpus whose licenses are read
_ROLES = ("corpus", "selection", "teacher", "init_from")
_TRAININGS = ("pretrain", "distill")


@dataclass(frozen=True)
class Source:
    """What a corpus was read from."""

    name: str
    images: int
    licenses: dict[str, int]
    """Images by license, as their .json files name it, from the commonest on"""
    read: int
    """Images whose .json files were looked at"""


@dataclass(frozen=True)
class Compute:
    """What a training took."""

    stage: str
    images: int
    """Seen, each time anew"""
    devices: str
    hours: float | None
    """Of all devices together; None where the speed is not known"""
    flops: float | None
    kwh: float | None
    """At the boards' full power; None where that is not known"""


@dataclass(frozen=True)
class Provenance:
    """Where a backbone comes from."""

    sources: list[Source]
    funnel: list[Step]
    compute: list[Compute]

    @classmethod
    def from_checkpoint(cls, checkpoint: Artifact) -> Provenance:
        """What is still to be found of that which a checkpoint was trained on and by."""
        artifacts = _find_training_sources(checkpoint)
        return cls(
            sources=[_source(each) for each in artifacts if each.manifest.stage == "ingest"],
            funnel=[step for each in artifacts if each.manifest.kind == "selection" for step in read_steps(each)],
            compute=[_compute(each) for each in artifacts if each.manifest.stage in _TRAININGS],
        )


def _find_training_sources(artifact: Artifact) -> list[Artifact]:
    """An artifact and all that went into its training, each once and before what was made from it; not what its images
    were only compared with."""
    found: dict[str, Artifact] = {}

    def visit(each: Artifact) -> None:
        for role, parent in each.manifest.inputs.items():
            made = find(parent.url) if role.startswith(_ROLES) else None
            if made is not None and made.id == parent.id and made.id not in found:
                visit(made)
        found[each.id] = each

    visit(artifact)
    return list(found.values())


def _source(artifact: Artifact) -> Source:
    corpus = Corpus.open(artifact.url)
    rows = np.unique(np.linspace(0, len(corpus) - 1, min(_SAMPLE, len(corpus))).astype(np.int64))
    named = [each for each in read_json_values(corpus, rows, "license", "licence") if isinstance(each, str)]
    licenses = dict(sorted(Counter(named).items(), key=lambda pair: (-pair[1], pair[0])))
    return Source(to_public(artifact.manifest.inputs["source"].url), len(corpus), licenses, len(rows))


def to_public(source: str) -> str:
    """A source's name as strangers may read it: of a folder on this machine its last part alone."""
    return source.rstrip("/").rpartition("/")[2] if filesystem.is_local(source) else source


def _compute(training: Artifact) -> Compute:
    told = training.metrics
    images, devices, device = told.get("images_seen", 0), told.get("devices", 1), told.get("device", "")
    speed = told.get("images_per_second", 0.0)  # 0 where nothing was left to train
    hours = devices * images / speed / 3600 if images and speed else None
    known, flops = hardware.find_gpu_name(device), told.get("flops_per_image")
    return Compute(
        stage=training.manifest.stage,
        images=images,
        devices=f"{devices} x {device}",
        hours=hours,
        flops=None if flops is None else flops * images,
        kwh=None if known is None or hours is None else hours * known.watts / 1000,
    )
