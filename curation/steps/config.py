"""Settings of the curation steps. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from infra.config import Config
from pretrain.backbones.config import OpenClipBackboneConfig


class Exact(Config):
    """Drop images whose bytes another image has."""

    kind: Literal["exact"] = "exact"


class Perceptual(Config):
    """Drop all but the largest of images that look the same at a glance: whose perceptual hashes hang together."""

    kind: Literal["perceptual"] = "perceptual"
    hash: Literal["dct", "pca"] = "dct"
    """dct: the signs of low frequencies; pca: on which side of the mean an image lies along principal components."""
    radius: int = Field(4, ge=0, le=31)
    """Bits of 64 in which two hashes may differ; the work grows quickly beyond 7."""
    min_entropy: float = Field(3.0, ge=0, le=8)
    """Bits of the gray values below which an image has too little on it for its hash to mean anything."""


class ImageQuality(Config):
    """Drop images with next to nothing on them."""

    kind: Literal["image_quality"] = "image_quality"
    min_entropy: float = Field(1.0, ge=0, le=8)
    """Bits of the gray values: 0 for one color."""
    min_sharpness: float = Field(0.0, ge=0)
    """Standard deviation of the Laplacian in gray values of 0 to 255; below about 3 an image is blurred."""


class CellSettings(Config):
    """Which vectors are compared where comparing all would take too long."""

    num_cells: int = Field(0, ge=0)
    """Clusters within which vectors are compared; 0: two square roots of their number, or one for 20,000 and fewer."""
    nprobe: int = Field(8, ge=1)
    """Clusters that a vector visits at most. More find more and take longer."""
    margin: float = Field(0.07, ge=0, le=2)
    """It visits those whose centroid is at most this much less similar than the nearest."""
    recall_audit_images: int = Field(1000, ge=0)
    """Random vectors that are compared with all others to measure what was missed; 0 measures nothing."""


class NearDuplicates(CellSettings):
    """Drop all but one image of every connected component of the similarity graph (DINOv2, appendix A)."""

    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: float | None = Field(None, gt=0, le=1)
    """Cosine similarity from which two images are joined. null: what was measured for the backbone of the embeddings; a
    backbone without a measurement needs a value."""
    representative: Literal["resolution", "bytes", "first_key", "field"] = "resolution"
    """Which image of a component stays: the one with most pixels, the largest file, the one whose key comes first, or
    the one that a field of the images' .json files prefers. Of equal ones a color image stays before a gray one, then
    the larger file, then the first key."""
    field: str | None = None
    """The field, for `field`: the highest number stays."""
    prefer: list[str] = Field(default_factory=list)
    """Values of the field in order of preference, licenses say; others come after them."""
    min_similarity_to_representative: float = Field(-1.0, ge=-1, le=1)
    """Members less similar than this to the image that stays are no copies of it: they form groups of their own. It
    undoes chains, where each image is like the next and the last is unlike the first. -1 leaves components whole."""
    allow_chains: bool = False
    """Accept a component of 50 images or more of which most are unlike the image that stays. false: stop, for the
    threshold is too low for the backbone. Not read where `min_similarity_to_representative` undoes chains."""

    @model_validator(mode="after")
    def _has_field(self) -> NearDuplicates:
        if self.prefer and self.field is None:
            raise ValueError("prefer: values of a field; give the field too")
        if (self.representative == "field") != (self.field is not None):
            raise ValueError("field and representative: field go together; give both or neither")
        return self


class Decontaminate(CellSettings):
    """Drop images too much like one of an evaluation set (DINOv2, appendix A)."""

    kind: Literal["decontaminate"] = "decontaminate"
    threshold: float | None = Field(None, gt=0, le=1)
    """Cosine similarity from which an image counts as a leak. null: what was measured for the backbone of the
    embeddings; a backbone without a measurement needs a value."""
    drop: Literal["hits", "components"] = "hits"
    """hits: images that are like an evaluation image. components: also all that hang together with them by pairs of at
    least the threshold. The paper can be read both ways, and both are counted."""
    count_components: bool = True
    """Count the components also where only hits are dropped; it takes a join of the whole corpus."""


class Retrieve(Config):
    """Keep only what is near a curated seed: the nearest images of each seed image (DINOv2, section 3)."""

    kind: Literal["retrieve"] = "retrieve"
    k: int = Field(4, ge=1)
    """Nearest images kept for each seed image."""
    min_similarity: float = Field(-1.0, ge=-1, le=1)
    """Neighbors less similar than this are not kept."""
    without_replacement: bool = False
    """Give each seed image neighbors of its own: what a more similar seed image has taken is replaced by the next."""
    index: Literal["auto", "exact", "ivfpq"] = "auto"
    """exact compares every seed image with every image; ivfpq finds candidates in a compressed FAISS index and compares
    those exactly, where there are 10,000 images or more; auto: exact up to 4e11 comparisons of one dimension."""
    recall_audit_images: int = Field(200, ge=0)
    """Seed images whose neighbors in the index are checked against the exact ones."""


class RetrieveClusters(Config):
    """Keep only what lies in clusters of the corpus that the curated seed falls into (DINOv2, section 3)."""

    kind: Literal["retrieve_clusters"] = "retrieve_clusters"
    clusters: int = Field(1000, ge=1)
    """Clusters of the corpus; DINOv2 has 100,000."""
    min_seeds: int = Field(4, ge=1)
    """Seed images from which a cluster counts."""
    quota: int = Field(10_000, ge=1)
    """Images kept of each such cluster, the nearest to its centroid."""
    most: int = Field(1_000_000, ge=1)
    """Images kept in all; clusters with most seed images come first."""


class SemDeDup(Config):
    """Drop images too similar to one of the same cluster (SemDeDup, arXiv 2303.09540)."""

    kind: Literal["semdedup"] = "semdedup"
    clusters: int = Field(0, ge=0)
    """Clusters; 0: one for each 1,000 images."""
    eps: float = Field(0.05, ge=0, le=2)
    """Images more similar than 1 - eps to one before them are dropped: more eps, fewer images."""
    keep: Literal["hard", "easy"] = "hard"
    """Which comes first: the one farther from the centroid, or the nearer."""


class Balance(Config):
    """Draw images evenly over concepts by hierarchical k-means (Vo et al., arXiv 2405.15613; DINOv3)."""

    kind: Literal["balance"] = "balance"
    levels: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [1000, 100], min_length=1)
    """Clusters of each level, from the finest; DINOv3 has 200 M, 8 M, 800 k, 100 k and 25 k."""
    target: int = Field(100_000, ge=1)
    """Images to draw."""
    num_resampling_steps: int = Field(10, ge=0)
    """Times that each level's clustering is made anew on the members nearest to its centroids, which evens it out."""
    sample_size: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Members of a cluster that a resampling takes, for each level; none: half the clusters' mean size."""
    max_repeats: int = Field(1, ge=1)
    """How often one image may be drawn; beyond 1 its weight says how often it was."""

    @model_validator(mode="after")
    def _levels_fall(self) -> Balance:
        if any(above >= below for below, above in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"levels {self.levels}: each must have fewer clusters than the one before")
        if self.sample_size and len(self.sample_size) != len(self.levels):
            raise ValueError(
                f"sample_size {self.sample_size}: give one number for each of the {len(self.levels)} levels"
            )
        return self


class RandomSample(Config):
    """Keep random images: what a curation has to beat."""

    kind: Literal["random_sample"] = "random_sample"
    count: int = Field(100_000, ge=1)
    """Images to keep, or all there are if that is less."""


class MetadataFilter(Config):
    """Drop images by what the index knows of them."""

    kind: Literal["metadata_filter"] = "metadata_filter"
    min_side: int = Field(0, ge=0)
    """Pixels of the shorter side; DataComp's basic filter has 200."""
    max_aspect: float | None = Field(None, ge=1)
    """Longer side over shorter; DataComp's basic filter has 3."""
    min_words: int = Field(0, ge=0)
    """Words of the caption; DataComp's basic filter has 3. Images without a caption have none."""
    min_characters: int = Field(0, ge=0)
    """Characters of the caption; DataComp's basic filter has 6."""


class FieldScorer(Config):
    """A number that each image's .json file has, as img2dataset and LAION write them."""

    kind: Literal["field"] = "field"
    field: str
    """Its name."""


class TableScorer(Config):
    """Scores made elsewhere."""

    kind: Literal["table"] = "table"
    table: str
    """URL of a parquet file with a column `key`."""
    column: str = "score"
    """Its column with the scores."""


class HeadScorer(Config):
    """Linear layers on the corpus's embeddings, as aesthetic and NSFW predictors on CLIP are given out."""

    kind: Literal["head"] = "head"
    checkpoint: str
    """Path of the layers' weights."""
    activation: Literal["none", "relu"] = "none"
    """Between the layers."""
    output: Literal["identity", "sigmoid", "softmax"] = "identity"
    """What is done to the last layer's output."""
    unit: int = Field(0, ge=0)
    """Which of its outputs is the score."""


class CaptionScorer(Config):
    """Cosine similarity of image and caption by an open_clip model, by which the corpus must be embedded."""

    kind: Literal["caption"] = "caption"
    model: OpenClipBackboneConfig
    """The model."""


class PluginScorer(Config):
    """Your own code: called with the checkpoint it gives a function of a list of images (Pillow, RGB) to numbers."""

    kind: Literal["plugin"] = "plugin"
    name: str
    """`package.module:name`, importable here."""
    checkpoint: str | None = None
    """File that it is called with."""
    version: str = "1"
    """Of your code: change it when that gives other numbers, or an earlier selection will be taken for this one."""


ScorerConfig = Annotated[
    FieldScorer | TableScorer | HeadScorer | CaptionScorer | PluginScorer, Field(discriminator="kind")
]


class Score(Config):
    """Drop images by a number: CLIP score, aesthetic and NSFW heads, a field, your own."""

    kind: Literal["score"] = "score"
    scorer: ScorerConfig
    """What gives the number. Images without one are dropped."""
    name: str = "score"
    """What the ledger calls it: images are dropped for low_NAME, high_NAME or no_NAME."""
    min: float | None = None
    """Lowest score kept."""
    max: float | None = None
    """Highest score kept."""
    top: float | None = Field(None, gt=0, le=1)
    """Share of the images with the highest scores that is kept; DataComp keeps 0.3 by CLIP score."""

    @model_validator(mode="after")
    def _some_bound(self) -> Score:
        if self.min is not None and self.top is not None:
            raise ValueError("score: min and top: give one of both")
        if self.min is None and self.max is None and self.top is None:
            raise ValueError("score: give min, max or top")
        return self


class Metaclip(Config):
    """Keep images by lot so that no word's captions outnumber the others (MetaCLIP, arXiv 2309.16671)."""

    kind: Literal["metaclip"] = "metaclip"
    entries: str
    """File with one word or phrase a line."""
    most: int = Field(20_000, ge=1)
    """Captions with an entry from which on images with it are thinned out; MetaCLIP has 20,000 for 400 M pairs."""


class Exclude(Config):
    """Drop images that are listed, whatever they look like: for those who opted out, or a source that must go."""

    kind: Literal["exclude"] = "exclude"
    keys: str | None = None
    """File with one key a line."""
    hashes: str | None = None
    """File with one SHA-256 of an image's bytes a line."""
    prefix: str | None = None
    """Keys that begin so: a source."""

    @model_validator(mode="after")
    def _something(self) -> Exclude:
        if self.keys is None and self.hashes is None and self.prefix is None:
            raise ValueError("exclude needs keys, hashes or prefix; give at least one")
        return self


class Restore(Config):
    """Keep again what an earlier step dropped."""

    kind: Literal["restore"] = "restore"
    reason: str
    """Why it was dropped: near_duplicate, leak, ..."""
    below: float | None = None
    """Only what has a lower score than this: was less similar to what it lost against, say."""
    keys: str | None = None
    """Only keys of this file, one a line."""


Step = Annotated[
    Exact
    | Perceptual
    | MetadataFilter
    | ImageQuality
    | Exclude
    | NearDuplicates
    | Decontaminate
    | SemDeDup
    | Retrieve
    | RetrieveClusters
    | Balance
    | Metaclip
    | Score
    | RandomSample
    | Restore,
    Field(discriminator="kind"),
]


_FILES = ("keys", "hashes", "entries", "table", "checkpoint")
"""Settings, at any depth, that name files: their content counts, not where they lie"""


def referenced_files(step: Config) -> Iterator[tuple[str, str]]:
    """The files that a step reads, by the setting's name."""
    for name, value in step:
        if isinstance(value, Config):
            yield from referenced_files(value)
        elif name in _FILES and value is not None:
            yield name, value


def settings_without_files(step: Config) -> dict[str, Any]:
    """The settings of a step, those apart that name files."""
    told = step.model_dump(mode="json", exclude=set(_FILES))
    nested = {name: settings_without_files(value) for name, value in step if isinstance(value, Config)}
    return told | nested
