"""Settings of ingest, embedding and curation. Imports nothing heavy, so that `fovea --help` stays quick."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from curation.steps.config import Exact, NearDuplicates, Step, settings_without_files
from infra.config import Config, Output
from pretrain.backbones.config import BackboneConfig, PixelDescriptorConfig


class SyntheticSettings(Config):
    """The synthetic corpus: how many images of each sort."""

    seed: int = Field(0, ge=0)
    """Seed of everything random in it."""
    pool_per_class: int = Field(150, ge=1)
    """Pool crops of each of the 18 photographs."""
    seed_per_class: int = Field(60, ge=1)
    """Labeled crops of each photograph in the curated seed."""
    test_per_class: int = Field(50, ge=1)
    """Labeled crops of each photograph in the evaluation set."""
    flat: int = Field(200, ge=0)
    """Junk: images of one color."""
    noise: int = Field(200, ge=0)
    """Junk: random pixels."""
    exact_copies: int = Field(300, ge=0)
    """Byte-identical copies."""
    near_copies: int = Field(400, ge=0)
    """Re-encoded, resized or slightly cropped copies."""
    leaks: int = Field(150, ge=0)
    """Copies of evaluation images."""
    broken: int = Field(40, ge=0)
    """Files that are no images, or not whole."""

    @model_validator(mode="after")
    def _leaks_exist(self) -> SyntheticSettings:
        if self.leaks > 18 * self.test_per_class:
            raise ValueError(f"leaks {self.leaks} are more than the {18 * self.test_per_class} evaluation images")
        return self


class IngestSettings(Config):
    """What counts as an image, and how shards are cut."""

    labels: Literal["auto", "folders", "json", "none"] = "auto"
    """folders: the first folder of a path is the class; json: a field of each image's .json file is; auto: folders if
    every image lies in one, else .cls files where there are any; none: no labels."""
    label_field: str = "label"
    """The field, for `json`."""
    annotation_suffixes: list[str] = Field(default_factory=list)
    """Suffixes of image files that annotate the image of the same name, such as png for masks beside jpg files. Without
    it, two images of one name are two samples. x.seg.png beside x.jpg in a shard needs no setting."""
    check: Literal["pixels", "header"] = "pixels"
    """pixels: decode every image, so that what is kept is known to be whole. header: read its dimensions alone, many
    times faster; training passes over those that then prove damaged."""
    bit_depth: int | None = Field(None, ge=9, le=32)
    """Significant bits of gray or color samples of more than 8 bits, such as 12 for sensor data in 16-bit files. null:
    the depth that a file declares; images that leave it open are rejected as `unknown_depth`."""
    window: tuple[float, float] | None = None
    """Sample values that become black and white in images of more than 8 bits, signed and floating-point ones included,
    such as [-1000, 400] for CT. null: `bit_depth`."""
    max_pixels: int = Field(100_000_000, ge=1, le=100_000_000)
    """Images that claim more are rejected unread."""
    max_file_mb: int = Field(256, ge=1)
    """Images in larger files, in MiB, are rejected unread."""
    min_side: int = Field(8, ge=1)
    """Images with a shorter side are rejected."""
    shard_mb: int = Field(256, ge=1)
    """Shards are closed at this size, in MiB."""

    @model_validator(mode="after")
    def _window_is_open(self) -> IngestSettings:
        if self.window is not None and self.window[1] <= self.window[0]:
            raise ValueError(f"window {list(self.window)}: the second value must be larger than the first")
        if self.window is not None and self.bit_depth is not None:
            raise ValueError("window and bit_depth both set black and white; give one")
        return self


class IngestConfig(IngestSettings, Output):
    """Index images as a corpus."""

    workers: int = Field(0, ge=0)
    """Number of processes that read shards. 0: one for each core."""

    source: str = Field(min_length=1)
    """URL of a folder of images, of class folders or of tar shards, of a glob of shards, or of a {000..999} range of
    them. The output of img2dataset is such a folder."""
    out: str
    """URL of the corpus; {id} stands for its id."""


class OnRay(Config):
    """Where what can be done in parts is done."""

    ray: str | None = None
    """Address of a Ray cluster (host:port, or auto). null: this machine. The cluster's machines need Fovea and the same
    folders, including $FOVEA_CACHE where artifacts are in a bucket."""


class EmbedSettings(OnRay):
    """Backbone and batch size of an embedding."""

    backbone: BackboneConfig = PixelDescriptorConfig()
    """Backbone that maps images to vectors."""
    batch: int = Field(256, ge=1)
    """Images in a forward pass."""


class EmbedConfig(EmbedSettings, Output):
    """Embed a corpus; writes embeddings."""

    corpus: str
    """URL of the corpus to embed."""
    previous: str | None = None
    """URL of embeddings of an earlier state of the corpus by the same backbone. Their vectors of unchanged images are
    reused. null: none."""
    out: str
    """URL of the embeddings; {id} stands for their id."""


def _default_steps() -> list[Step]:
    return [Exact(), NearDuplicates()]


class CurateSettings(OnRay):
    """Steps, in order; each sees what the ones before it kept."""

    steps: list[Step] = Field(default_factory=_default_steps, min_length=1)
    """Steps, in order: exact, perceptual, metadata_filter, image_quality, exclude, near_duplicates, decontaminate,
    semdedup, retrieve, retrieve_clusters, balance, metaclip, score, random_sample, restore."""
    seed: int = Field(0, ge=0)
    """Seed of all random choices."""
    memory_gb: float = Field(4.0, gt=0)
    """Maximum memory in GiB; larger data goes to disk. The selection does not depend on it."""
    workers: int = Field(0, ge=0)
    """Number of threads that compare vectors. 0: one for each core. The selection does not depend on it."""


class CurateConfig(CurateSettings, Output):
    """Corpus and embeddings in, a selection out: a verdict for every image."""

    def identity_settings(self) -> dict[str, Any]:
        """The settings that decide the selection: not where listed files lie, nor what it may take."""
        return {"steps": [settings_without_files(step) for step in self.steps], "seed": self.seed}

    corpus: str
    """URL of the corpus to choose from."""
    embeddings: str | None = None
    """URL of the corpus's embeddings, for steps that compare vectors. null: none."""
    eval_embeddings: list[str] = Field(default_factory=list)
    """URLs of the embeddings of evaluation sets, for `decontaminate`."""
    seed_embeddings: str | None = None
    """URL of the embeddings of the curated seed, for `retrieve` and `retrieve_clusters`."""
    selection: str | None = None
    """URL of an earlier selection over the same corpus to start from."""
    previous: str | None = None
    """URL of a selection by the same steps over an earlier state of the corpus: what they compared then is compared no
    more, and only cells that new or changed images visit are joined."""
    out: str
    """URL of the selection; {id} stands for its id."""


class FaceBlur(Config):
    """Blurs faces, as DINOv2 and DataComp did to their pools, in all images of a sample. What has one is encoded anew:
    transparency is laid on white, of an animation one frame is left."""

    model: str | None = None
    """Path of a YuNet face detector (ONNX); null: the cascade for frontal faces that comes with scikit-image, which
    misses more."""
    min_score: float = Field(0.3, gt=0, lt=1)
    """How sure that detector has to be; DataComp has 0.3."""
    min_share: float = Field(0.1, gt=0, le=1)
    """The smallest face the cascade looks for, as a share of the image's shorter side."""
    margin: float = Field(0.15, ge=0, le=1)
    """What is blurred around each face, as a share of its side."""


class MaterializeConfig(Output):
    """Corpus and selection in, a corpus of what was kept out. Images keep their bytes unless faces are blurred, and
    always metadata and keys."""

    corpus: str
    """URL of the corpus."""
    selection: str
    """URL of the selection."""
    shard_mb: int = Field(256, ge=1)
    """Shards are closed at this size, in MiB."""
    blur_faces: FaceBlur | None = None
    """Blur faces; images with any are encoded anew."""
    out: str
    """URL of the new corpus; {id} stands for its id."""
