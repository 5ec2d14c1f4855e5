"""Settings of evaluation and of the run's page."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from infra.config import Config
from pretrain.config import BackboneConfig


class EvaluateSettings(Config):
    """Protocols and their settings."""

    knn_k: int = Field(20, ge=1)
    """Neighbours that vote."""
    knn_temperature: float = Field(0.07, gt=0)
    """A vote weighs exp(cosine / this)."""
    linear_c: list[float] = Field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0], min_length=1)
    """Inverse regularisation strengths of the linear probe; the best on held-out training images is taken."""
    held_out: float = Field(0.2, gt=0, lt=1)
    """Share of the training images that chooses it."""
    bootstrap: int = Field(1000, ge=10)
    """Resamples of the test set for the 95 % intervals."""
    baselines: bool = True
    """Measure the untrained network and raw pixels beside the backbone."""
    seed: int = Field(0, ge=0)
    """Seed of the split and of the resampling."""
    batch: int = Field(256, ge=1)
    """Images a forward pass."""


class EvaluateConfig(EvaluateSettings):
    """Backbone, training and test corpus in, report out."""

    model: BackboneConfig
    """The backbone."""
    train: str
    """URL of the labelled corpus that kNN and probe learn from."""
    test: str
    """URL of the labelled corpus that is scored."""
    out: str
    """URL of the report; {id} stands for its id."""


class CompareConfig(Config):
    """Reports of evaluations in groups, of several seeds say; one report that holds them side by side out."""

    title: str = "Comparison"
    """Heading of the page."""
    groups: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(min_length=1)
    """Name of each group and the URLs of its reports; the first group is what others are compared with, report by
    report."""
    out: str
    """URL of the report; {id} stands for its id."""


class ReportSettings(Config):
    """What the page of a run shows."""

    title: str = "Fovea run"
    """Heading of the page."""
    gallery: int = Field(24, ge=1)
    """Examples in each gallery."""


class ReportConfig(ReportSettings):
    """Artifacts of a run in, one page out."""

    artifacts: dict[str, str]
    """Name of each stage and URL of its artifact, in the order of the run."""
    facts: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Named scores to show on top, where the truth is known."""
    out: str
    """URL of the report; {id} stands for its id."""
