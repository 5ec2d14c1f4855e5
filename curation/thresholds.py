"""Similarity thresholds belong to the backbone that made the vectors: defaults that were measured, by backbone."""

from __future__ import annotations

from curation.steps.config import Decontaminate, NearDuplicates, Step
from infra.corpus.embeddings import Embeddings
from infra.errors import UserError
from pretrain.backbones.config import PixelDescriptorConfig

_PIXELS = {"near_duplicates": 0.95, "decontaminate": 0.9}
"""Of the pixel descriptor with its default settings, on 2,114 photographs of four sources: 0.95 joins no two different
photographs, and finds all re-encoded and halved copies and 96 % of those that lose 1.5 % at each border; 0.9 joins 5 of
2.2 million pairs, and finds 99 % of these."""


def with_thresholds(steps: list[Step], embeddings: Embeddings | None) -> list[Step]:
    """Steps with a threshold in the place of each one left to the backbone.

    Raises:
        UserError: none was measured for the backbone.
    """
    return [
        step.model_copy(update={"threshold": default_threshold(number, step, embeddings)})
        if isinstance(step, NearDuplicates | Decontaminate) and step.threshold is None
        else step
        for number, step in enumerate(steps)
    ]


def default_threshold(number: int, step: NearDuplicates | Decontaminate, embeddings: Embeddings | None) -> float:
    """The measured threshold of a step for the backbone of some embeddings.

    Raises:
        UserError: there is none.
    """
    backbone = {} if embeddings is None else embeddings.artifact.manifest.config
    if backbone == PixelDescriptorConfig().model_dump(mode="json"):
        return _PIXELS[step.kind]
    kind = backbone.get("kind", "unknown")
    raise UserError(
        f"steps.{number}.threshold: none was measured for this backbone (kind {kind}, or its own settings); give one "
        f"(--steps.{number}.threshold), such as {_SSCD_THRESHOLDS[step.kind]} for SSCD"
    )


_SSCD_THRESHOLDS = {"near_duplicates": 0.6, "decontaminate": 0.45}  # DINOv2 (arXiv 2304.07193), appendix A
