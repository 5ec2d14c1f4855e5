"""What a published directory is made from, and its files: weights in each format, checked, beside the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.config import FormatName, PublishConfig, PublishSettings
from distill.export.card import count_parameters, model_card
from distill.export.formats.registry import FORMATS
from distill.export.formats.source import PublishSource
from distill.export.preparation import FILE, image_processor_json
from distill.export.provenance import to_public
from distill.export.verify import max_difference, sample_pixels
from infra.artifacts.artifact import Artifact, open_artifact
from infra.artifacts.lineage import ancestors
from infra.artifacts.manifest import ArtifactRef
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from pretrain.checkpoint.artifact import Checkpoint


@dataclass(frozen=True)
class ReleaseInputs:
    """All that a published directory is made from."""

    settings: PublishSettings
    formats: Sequence[FormatName]
    checkpoint: Checkpoint
    images: Corpus
    reports: Sequence[Artifact]

    @classmethod
    def open(cls, config: PublishConfig, formats: Sequence[FormatName]) -> ReleaseInputs:
        """Open what a configuration names."""
        reports = [open_artifact(url, "report") for url in config.reports]
        return cls(config, formats, Checkpoint.open(config.checkpoint), Corpus.open(config.images), reports)


def write_release(release: ReleaseInputs, inputs: Mapping[str, ArtifactRef], directory: Path) -> Mapping[str, Any]:
    """Write all formats and the model card into a directory; return the metrics.

    Raises:
        UserError: features of a format differ by more than the tolerance.
    """
    material = PublishSource.from_checkpoint(release.checkpoint)
    pixels, differences = sample_pixels(release.images, material), dict[str, float]()
    for name in release.formats:
        FORMATS[name].write(material, directory)
        found = max_difference(name, directory, material, pixels)
        if not found <= release.settings.tolerance:  # also where it is not a number
            raise UserError(f"publish: {name}: features differ by {found:.1e}; raise tolerance only for a known reason")
        differences[name] = found
    told = [{"id": each.id, **each.read_json("report.json")} for each in release.reports]
    (directory / "eval.json").write_text(json.dumps(told, indent=1))
    side = material.backbone.image_size
    (directory / FILE).write_text(json.dumps(image_processor_json(side, material.views), indent=2))
    lineage = [replace(each, url=to_public(each.url)) for each in ancestors(inputs.values())]
    (directory / "lineage.json").write_text(json.dumps([each.as_dict() for each in lineage], indent=1))
    card = model_card(release.settings, release.checkpoint, material.backbone, told, lineage, differences)
    (directory / "README.md").write_text(card)
    return {"max_abs_diff": differences, "parameters": count_parameters(material.backbone)}
