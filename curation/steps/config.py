"""Settings of the curation steps. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from infra.config import Config
from pretrain.backbones.config import OpenClipBackboneConfig


class Exact(Config):
    """Drop images whose bytes equal those of another image."""

    kind: Literal["exact"] = "exact"


class Perceptual(Config):
    """Drop all but the largest of images that are connected by similar perceptual hashes."""

    kind: Literal["perceptual"] = "perceptual"
    hash: Literal["dct", "pca"] = "dct"
    """Hash: dct (signs of low frequencies) or pca (side of the mean along principal components)."""
    radius: int = Field(4, ge=0, le=31)
    """Maximum number of differing bits of 64. The work grows quickly above 7."""
    min_entropy: float = Field(3.0, ge=0, le=8)
    """Minimum entropy of the gray values in bits; the hash of an image below it means little."""


class ImageQuality(Config):
    """Drop blank and blurred images."""

    kind: Literal["image_quality"] = "image_quality"
    min_entropy: float = Field(1.0, ge=0, le=8)
    """Minimum entropy of the gray values in bits; 0 for a single color."""
    min_sharpness: float = Field(0.0, ge=0)
    """Minimum standard deviation of the Laplacian of gray values 0 to 255. Images below about 3 are blurred. 0: no
    limit."""


class CellSettings(Config):
    """Cells of an inverted file, which limit the comparisons of a join."""

    num_cells: int = Field(0, ge=0)
    """Number of k-means cells; vectors are compared within them. 0: two square roots of the number of vectors, or a
    single cell for 20,000 and fewer."""
    nprobe: int = Field(8, ge=1)
    """Maximum number of cells searched per vector. Higher values raise recall and run time."""
    margin: float = Field(0.07, ge=0, le=2)
    """Maximum difference to the similarity of the nearest centroid; cells beyond it are not searched."""
    recall_audit_images: int = Field(1000, ge=0)
    """Number of random vectors that are compared with all others to measure recall. 0: no audit."""


class NearDuplicates(CellSettings):
    """Drop all but one image of every connected component of the similarity graph (DINOv2, appendix A)."""

    kind: Literal["near_duplicates"] = "near_duplicates"
    threshold: float | None = Field(None, gt=0, le=1)
    """Cosine similarity from which two images are connected. null: the measured value of the embeddings' backbone; a
    backbone without one needs a value."""
    representative: Literal["resolution", "bytes", "first_key", "field"] = "resolution"
    """Image of a component that is kept: the one with most pixels (resolution), the largest file (bytes), the first key
    (first_key), or the one that `field` prefers. Ties go to color over gray images, then to the larger file, then to
    the first key."""
    field: str | None = None
    """Field of the images' .json files for `representative: field`; the highest number wins. null: none."""
    prefer: list[str] = Field(default_factory=list)
    """Values of `field` in order of preference, such as licenses. Other values come last."""
    min_similarity_to_representative: float = Field(-1.0, ge=-1, le=1)
    """Minimum similarity of a member to the kept image; members below it form groups of their own, which breaks chains
    of similar images. -1 keeps components whole."""
    allow_chains: bool = False
    """Accept a component of 50 or more images that are mostly unlike the kept image. false stops there, because the
    threshold is too low for the backbone. Not read with `min_similarity_to_representative`."""

    @model_validator(mode="after")
    def _has_field(self) -> NearDuplicates:
        if self.prefer and self.field is None:
            raise ValueError("prefer: values of a field; give the field too")
        if (self.representative == "field") != (self.field is not None):
            raise ValueError("field and representative: field go together; give both or neither")
        return self


class Decontaminate(CellSettings):
    """Drop images that are near-duplicates of an evaluation set's (DINOv2, appendix A)."""

    kind: Literal["decontaminate"] = "decontaminate"
    threshold: float | None = Field(None, gt=0, le=1)
    """Cosine similarity from which an image is a leak. null: the measured value of the embeddings' backbone; a backbone
    without one needs a value."""
    drop: Literal["hits", "components"] = "hits"
    """Images to drop: those similar to an evaluation image (hits), or whole components that contain one (components).
    The paper can be read both ways; the report counts both."""
    count_components: bool = True
    """Count components even where only hits are dropped; this takes a join of the whole corpus."""


class Retrieve(Config):
    """Keep only the nearest images of each image of a curated seed (DINOv2, section 3)."""

    kind: Literal["retrieve"] = "retrieve"
    k: int = Field(4, ge=1)
    """Number of nearest images to keep for each seed image."""
    min_similarity: float = Field(-1.0, ge=-1, le=1)
    """Minimum similarity of the images to keep."""
    without_replacement: bool = False
    """Replace an image that a more similar seed image has taken by the next nearest, so that each seed image has images
    of its own."""
    index: Literal["auto", "exact", "ivfpq"] = "auto"
    """Search: exact compares every seed image with every image; ivfpq finds candidates in a FAISS index and compares
    those exactly (10,000 images or more); auto is exact up to 4e11 comparisons of one dimension."""
    recall_audit_images: int = Field(200, ge=0)
    """Number of seed images whose neighbors are compared with an exact search to measure recall."""


class RetrieveClusters(Config):
    """Keep only images of the clusters that contain curated seed images (DINOv2, section 3)."""

    kind: Literal["retrieve_clusters"] = "retrieve_clusters"
    clusters: int = Field(1000, ge=1)
    """Number of clusters; DINOv2 has 100,000."""
    min_seeds: int = Field(4, ge=1)
    """Minimum number of seed images of a cluster."""
    quota: int = Field(10_000, ge=1)
    """Maximum number of images to keep of each cluster, nearest to its centroid first."""
    most: int = Field(1_000_000, ge=1)
    """Maximum number of images to keep; clusters with most seed images come first."""


class SemDeDup(Config):
    """Drop images that are too similar to another image of the same cluster (SemDeDup, arXiv 2303.09540)."""

    kind: Literal["semdedup"] = "semdedup"
    clusters: int = Field(0, ge=0)
    """Number of clusters. 0: one for each 1,000 images."""
    eps: float = Field(0.05, ge=0, le=2)
    """Images more similar than 1 - eps to an earlier image of their cluster are dropped. Higher values drop more."""
    keep: Literal["hard", "easy"] = "hard"
    """Images that come first: those far from the centroid (hard) or near it (easy)."""


class Balance(Config):
    """Sample images evenly over concepts by hierarchical k-means (Vo et al., arXiv 2405.15613; DINOv3)."""

    kind: Literal["balance"] = "balance"
    levels: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [1000, 100], min_length=1)
    """Number of clusters of each level, finest first; DINOv3 has 200 M, 8 M, 800 k, 100 k and 25 k."""
    target: int = Field(100_000, ge=1)
    """Number of images to sample."""
    num_resampling_steps: int = Field(10, ge=0)
    """Number of times that each level is clustered again on the members nearest to its centroids, which evens it out.
    """
    sample_size: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Members of a cluster that a resampling step takes, for each level. Empty: half the clusters' mean size."""
    max_repeats: int = Field(1, ge=1)
    """Maximum number of times that an image is sampled; its weight counts them."""

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
    """Keep random images, the baseline of a curation."""

    kind: Literal["random_sample"] = "random_sample"
    count: int = Field(100_000, ge=1)
    """Number of images to keep; all of them if there are fewer."""


class MetadataFilter(Config):
    """Drop images by side, aspect ratio and caption."""

    kind: Literal["metadata_filter"] = "metadata_filter"
    min_side: int = Field(0, ge=0)
    """Minimum shorter side in pixels; DataComp's basic filter has 200. 0: no limit."""
    max_aspect: float | None = Field(None, ge=1)
    """Maximum ratio of the longer to the shorter side; DataComp's basic filter has 3. null: no limit."""
    min_words: int = Field(0, ge=0)
    """Minimum number of words of the caption; DataComp's basic filter has 3. Images without a caption have 0."""
    min_characters: int = Field(0, ge=0)
    """Minimum number of characters of the caption; DataComp's basic filter has 6."""


class FieldScorer(Config):
    """Score by a number in each image's .json file, as img2dataset and LAION write it."""

    kind: Literal["field"] = "field"
    field: str
    """Name of the field."""


class TableScorer(Config):
    """Score by a table of scores."""

    kind: Literal["table"] = "table"
    table: str
    """URL of a parquet file with a column `key`."""
    column: str = "score"
    """Column of the scores."""


class HeadScorer(Config):
    """Score by linear layers on the corpus's embeddings, such as aesthetic and NSFW predictors on CLIP."""

    kind: Literal["head"] = "head"
    checkpoint: str
    """Path of the layers' weights."""
    activation: Literal["none", "relu"] = "none"
    """Activation between the layers."""
    output: Literal["identity", "sigmoid", "softmax"] = "identity"
    """Function of the last layer's output."""
    unit: int = Field(0, ge=0)
    """Index of the output that is the score."""


class CaptionScorer(Config):
    """Score by the cosine similarity of image and caption in an open_clip model; the corpus's embeddings must be of
    that model."""

    kind: Literal["caption"] = "caption"
    model: OpenClipBackboneConfig
    """The model."""


class PluginScorer(Config):
    """Score by your own function, which maps a list of images (Pillow, RGB) to numbers. It is made by calling `name`
    with `checkpoint`."""

    kind: Literal["plugin"] = "plugin"
    name: str
    """`package.module:name`, importable here."""
    checkpoint: str | None = None
    """Path that the function is made with. null: none."""
    version: str = "1"
    """Version of your code. Change it when the scores change; otherwise an earlier selection is reused."""


ScorerConfig = Annotated[
    FieldScorer | TableScorer | HeadScorer | CaptionScorer | PluginScorer, Field(discriminator="kind")
]


class Score(Config):
    """Drop images by a number: CLIP score, aesthetic and NSFW heads, a field, your own."""

    kind: Literal["score"] = "score"
    scorer: ScorerConfig
    """Scorer. Images without a score are dropped."""
    name: str = "score"
    """Name of the score in the selection's reasons: low_NAME, high_NAME and no_NAME."""
    min: float | None = None
    """Minimum score to keep. null: no limit."""
    max: float | None = None
    """Maximum score to keep. null: no limit."""
    top: float | None = Field(None, gt=0, le=1)
    """Share of the images with the highest scores to keep; DataComp keeps 0.3 by CLIP score. null: no limit."""

    @model_validator(mode="after")
    def _some_bound(self) -> Score:
        if self.min is not None and self.top is not None:
            raise ValueError("score: min and top: give one of both")
        if self.min is None and self.max is None and self.top is None:
            raise ValueError("score: give min, max or top")
        return self


class Metaclip(Config):
    """Keep random images so that no metadata entry dominates the captions (MetaCLIP, arXiv 2309.16671)."""

    kind: Literal["metaclip"] = "metaclip"
    entries: str
    """Path of a file with one word or phrase a line."""
    most: int = Field(20_000, ge=1)
    """Number of captions with an entry above which its images are thinned out; MetaCLIP has 20,000 for 400 M pairs."""


class Exclude(Config):
    """Drop listed images, such as opt-outs or a withdrawn source."""

    kind: Literal["exclude"] = "exclude"
    keys: str | None = None
    """Path of a file with one key a line. null: none."""
    hashes: str | None = None
    """Path of a file with one SHA-256 of an image's bytes a line. null: none."""
    prefix: str | None = None
    """Prefix of the keys to drop, such as a source. null: none."""

    @model_validator(mode="after")
    def _something(self) -> Exclude:
        if self.keys is None and self.hashes is None and self.prefix is None:
            raise ValueError("exclude needs keys, hashes or prefix; give at least one")
        return self


class Restore(Config):
    """Keep images again that an earlier step dropped."""

    kind: Literal["restore"] = "restore"
    reason: str
    """Reason of the images to restore, such as near_duplicate or leak."""
    below: float | None = None
    """Maximum score of the images to restore, such as the similarity to the representative. null: no limit."""
    keys: str | None = None
    """Path of a file with one key a line; only these are restored. null: all."""


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
