"""What the protocols of an evaluation can be told. Imports no torch, so that `fovea --help` stays quick."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from infra.config import Config

_LEARNING_RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]  # DINOv2's

SelectOn = Literal["validation", "test"]


class Task(Config):
    """What all protocols share."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._()+-]{0,59}$")
    """Name in the report: letters, digits, blanks and ._()+-; null: its kind."""

    @property
    def protocol(self) -> str:
        """What its scores are called."""
        return self.name or str(getattr(self, "kind", ""))

    def datasets(self) -> list[str]:
        """Names of the datasets that it reads."""
        return [str(getattr(self, role)) for role in ("train", "test", "queries") if hasattr(self, role)]

    def optional_datasets(self) -> list[str]:
        """Names of those that it reads if they are given."""
        return []


class ClassificationTask(Task):
    """What protocols share that name one of the classes of a set."""

    test: str = "test"
    """Name of the labeled dataset that is scored."""
    ood_datasets: list[OodDataset] = Field(default_factory=list)
    """Further sets that the same classifier is scored on: robustness."""

    def optional_datasets(self) -> list[str]:
        return [each.dataset for each in self.ood_datasets]


class OodDataset(Config):
    """A set of the same classes, of some of them, or of others that can be read as them: ImageNet-V2, -A, -R, -Sketch,
    ObjectNet."""

    dataset: str
    """Name of the labeled dataset."""
    classes: str | None = None
    """YAML or JSON file: for each of its classes the class, or list of classes, of the training set that it is; classes
    that are left out are not scored. null: classes of the same names."""
    restrict: bool = True
    """Choose only among classes that the set can have."""


class LearnedTask(ClassificationTask):
    """What protocols share that learn from labeled images."""

    train: str = "train"
    """Name of the labeled dataset that is learned from."""
    select_on: SelectOn = "validation"
    """How settings are chosen: by a part of the training set, which says nothing of the test set; or, as published, the
    best on the test set that is reported, a little too good to be true."""

    def num_candidates(self) -> int:
        """How many settings it chooses among."""
        return 1


class Knn(LearnedTask):
    """Weighted vote of the nearest neighbors (DINO, arXiv 2104.14294, section 4.1)."""

    kind: Literal["knn"] = "knn"
    k: list[PositiveInt] = Field(default_factory=lambda: [10, 20, 100, 200], min_length=1)
    """Numbers of neighbors that vote; the chosen one is the score, all are reported."""
    temperature: float = Field(0.07, gt=0)
    """A vote weighs exp(cosine / this)."""
    per_class: list[PositiveInt] = Field(default_factory=list)
    """Score also with this many training images a class."""
    num_draws: int = Field(5, ge=1)
    """Draws of them; means over draws are reported."""

    def num_candidates(self) -> int:
        return len(self.k)


class Linear(LearnedTask):
    """One linear layer on frozen features, a grid of them trained together (DINOv2, arXiv 2304.07193, section 7.1)."""

    kind: Literal["linear"] = "linear"
    learning_rates: list[PositiveFloat] = Field(default_factory=lambda: list(_LEARNING_RATES), min_length=1)
    """Base learning rates, for a batch of 256."""
    blocks: list[PositiveInt] = Field(default_factory=lambda: [1, 4], min_length=1)
    """Of how many last blocks the class tokens are taken."""
    average_pool: list[bool] = Field(default_factory=lambda: [False, True], min_length=1)
    """With or without the mean of the last block's patch tokens."""
    epochs: int = Field(10, ge=1)
    """Passes over the training features."""
    min_steps: int = Field(1000, ge=1)
    """Steps at least, however few features there are."""
    batch: int = Field(128, ge=1)
    """Features a step."""
    views: int = Field(1, ge=1)
    """Of each training image: the first is its center, as in the test set, further ones are random crops, flipped or
    not. DINOv2 takes a new crop each time."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that chooses."""

    def num_candidates(self) -> int:
        return len(self.learning_rates) * len(self.blocks) * len(self.average_pool)


class Logistic(LearnedTask):
    """Multinomial logistic regression on frozen features (scikit-learn's, by L-BFGS)."""

    kind: Literal["logistic"] = "logistic"
    C: list[PositiveFloat] = Field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0], min_length=1)
    """Inverse regularization strengths C; DINOv2 takes 45 from 1e-6 to 1e5."""
    standardize: bool = True
    """Bring every dimension to mean 0 and deviation 1, which DINOv2 does not."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that chooses."""
    max_iterations: int = Field(1000, ge=1)
    """Of the optimizer, at most."""

    def num_candidates(self) -> int:
        return len(self.C)


class FewShot(ClassificationTask):
    """Logistic regression on few images a class."""

    kind: Literal["few_shot"] = "few_shot"
    train: str = "train"
    """Name of the labeled dataset that is drawn from."""
    shots: list[PositiveInt] = Field(default_factory=lambda: [1, 5, 10], min_length=1)
    """Images a class."""
    num_draws: int = Field(5, ge=2)
    """Of each number; their mean is reported, with Student's t interval."""
    C: float = Field(100.0, gt=0)
    """Inverse regularization strength C, on vectors of unit length."""


class FineTune(LearnedTask):
    """The last blocks and a linear layer trained together."""

    kind: Literal["fine_tune"] = "fine_tune"
    blocks: int = Field(1, ge=0)
    """Last blocks that are trained."""
    learning_rates: list[PositiveFloat] = Field(default_factory=lambda: [1e-4, 5e-4], min_length=1)
    """Of AdamW."""
    weight_decay: float = Field(0.05, ge=0)
    """Of AdamW."""
    epochs: int = Field(10, ge=1)
    """Passes over the training images."""
    batch: int = Field(64, ge=1)
    """Images a step."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that chooses."""

    def num_candidates(self) -> int:
        return len(self.learning_rates)


class ZeroShot(ClassificationTask):
    """Classes by the nearest text (CLIP, arXiv 2103.00020, section 3.1)."""

    kind: Literal["zero_shot"] = "zero_shot"
    prompts: str = "plain"
    """Prompt templates: a name in eval/prompts, or the path of a text file with one template a line, `{}` the class."""
    class_names: str | None = None
    """YAML or JSON file with the classes' names as one would say them, a mapping or a list; null: the dataset's own."""


class ImageText(Task):
    """Retrieval of captions by images and of images by captions (recall at k)."""

    kind: Literal["image_text"] = "image_text"
    test: str = "test"
    """Name of the captioned dataset."""
    recall_at: list[PositiveInt] = Field(default_factory=lambda: [1, 5, 10], min_length=1)
    """How many of the first answers count."""
    captions_per_line: bool = True
    """Each line of a caption is a caption of its own, as in COCO."""


class DenseTask(Task):
    """What protocols share that judge patch tokens by a map beside each image."""

    train: str = "train"
    """Name of the dataset that is learned from."""
    test: str = "test"
    """Name of the dataset that is scored."""
    grid: int = Field(32, ge=1)
    """Patches along each side of the square that images are brought to; a backbone of one size keeps to its own."""


class SegmentationSettings(DenseTask):
    """What linear and kNN segmentation share."""

    annotation_suffix: str = "seg.png"
    """Extension of the mask beside each image: one class number a pixel."""
    ignore: list[int] = Field(default_factory=lambda: [255])
    """Numbers that are neither learned nor scored."""


class Segmentation(SegmentationSettings):
    """A linear layer on patch tokens (DINOv2, section 7.4: linear)."""

    kind: Literal["segmentation"] = "segmentation"
    learning_rates: list[PositiveFloat] = Field(default_factory=lambda: [1e-3, 1e-2], min_length=1)
    """Of AdamW; trained together, chosen by a part of the training images."""
    weight_decay: float = Field(1e-3, ge=0)
    """Of AdamW."""
    steps: int = Field(2000, ge=1)
    """Steps of the training."""
    batch: int = Field(16, ge=1)
    """Images a step."""
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the training images that chooses."""


class KnnSegmentation(SegmentationSettings):
    """Each patch gets the weighted vote of the most similar patches of the training images."""

    kind: Literal["knn_segmentation"] = "knn_segmentation"
    k: int = Field(20, ge=1)
    """Patches that vote."""
    temperature: float = Field(0.07, gt=0)
    """A vote weighs exp(cosine / this)."""
    bank_size: int = Field(200_000, ge=1)
    """Patches of the training images that are kept, drawn at random."""


class Depth(DenseTask):
    """Depth in bins by a linear layer on patch tokens (DINOv2, section 7.4; AdaBins' bins)."""

    kind: Literal["depth"] = "depth"
    annotation_suffix: str = "depth.png"
    """Extension of the map beside each image: 16-bit PNG; 0 where nothing is known."""
    scale: float = Field(0.001, gt=0)
    """Meters that 1 stands for."""
    nearest: float = Field(0.001, gt=0)
    """Least depth, in meters."""
    farthest: float = Field(10.0, gt=0)
    """Greatest depth, in meters; what is farther is not scored."""
    bins: int = Field(256, ge=2)
    """Between them, evenly."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of AdamW."""
    steps: int = Field(2000, ge=1)
    """Steps of the training."""
    batch: int = Field(16, ge=1)
    """Images a step."""


class VideoSegmentation(Task):
    """A video's first mask carried through it by patch likeness (DINO, section 4.2.2; DAVIS 2017: J and F)."""

    kind: Literal["video_segmentation"] = "video_segmentation"
    test: str = "test"
    """Name of the dataset: frames in the order of their keys, a folder a video, a mask of object numbers each."""
    annotation_suffix: str = "seg.png"
    """Extension of the mask."""
    grid: int = Field(30, ge=1)
    """Patches along the shorter side of frames."""
    num_context_frames: int = Field(7, ge=1)
    """Frames before, apart from the first, that are looked at."""
    num_neighbors: int = Field(5, ge=1)
    """Patches that say what a patch is."""
    radius: int = Field(12, ge=1)
    """Patches that a thing may have moved since a frame."""
    temperature: float = Field(0.1, gt=0)
    """A patch weighs exp(cosine / this)."""


class Correspondence(Task):
    """Where a point of one image lies in another, by the most similar patch token (SPair-71k: PCK)."""

    kind: Literal["correspondence"] = "correspondence"
    test: str = "test"
    """Name of the dataset with both images."""
    pairs: str
    """JSON file: a list of {source, target, source_points, target_points, size}: keys, points [x, y] in pixels of the
    images, and the larger side of the thing's box in the target."""
    alpha: float = Field(0.1, gt=0)
    """A point is right when it lies within this share of `size`."""
    grid: int = Field(32, ge=1)
    """Patches along each side of the square that images are brought to."""


class Retrieval(Task):
    """Instance retrieval (Oxford and Paris, revisited: arXiv 1803.11285): mean average precision, medium and hard."""

    kind: Literal["retrieval"] = "retrieval"
    test: str = "test"
    """Name of the dataset that is searched."""
    queries: str = "queries"
    """Name of the dataset of queries."""
    ground_truth: str
    """JSON file: for each query's key {easy, hard, junk}: lists of keys, and `box` [left, top, right, bottom] that the
    query is cut to."""


class CopyDetection(Task):
    """Copies among images that are none: micro average precision over all pairs (DISC21, arXiv 2106.09672)."""

    kind: Literal["copy_detection"] = "copy_detection"
    test: str = "test"
    """Name of the dataset of references."""
    queries: str = "queries"
    """Name of the dataset of queries."""
    ground_truth: str
    """JSON file: for each query that is a copy, by key, the keys of its originals."""
    num_candidates: int = Field(10, ge=1)
    """References a query that are ranked."""


class Corruptions(Task):
    """Accuracy on images damaged in the ways of ImageNet-C (arXiv 1903.12261), on the fly, by a kNN classifier."""

    kind: Literal["corruptions"] = "corruptions"
    train: str = "train"
    """Name of the labeled dataset that votes."""
    test: str = "test"
    """Name of the labeled dataset that is damaged."""
    corruptions: list[str] = Field(default_factory=list)
    """Names of the corruptions; none: all."""
    severities: list[int] = Field(default_factory=lambda: [1, 3, 5], min_length=1)
    """1 to 5."""
    images: int = Field(1000, ge=1)
    """Test images, evenly spread, at most."""
    k: int = Field(20, ge=1)
    """Neighbors that vote."""
    temperature: float = Field(0.07, gt=0)
    """A vote weighs exp(cosine / this)."""

    @model_validator(mode="after")
    def _severe(self) -> Corruptions:
        if any(not 1 <= each <= 5 for each in self.severities):
            raise ValueError(f"severities {self.severities}: from 1 to 5")
        return self


class Typographic(Task):
    """Zero-shot accuracy when the name of another class is written on each image."""

    kind: Literal["typographic"] = "typographic"
    test: str = "test"
    """Name of the labeled dataset."""
    prompts: str = "plain"
    """Prompt templates: a name in eval/prompts, or the path of a text file with one template a line, `{}` the class."""
    class_names: str | None = None
    """YAML or JSON file with the classes' names as one would say them, a mapping or a list; null: the dataset's own."""


class Representation(Task):
    """Whether representations use their space: RankMe, LiDAR, alpha-ReQ, norms of patch tokens, use of prototypes."""

    kind: Literal["representation"] = "representation"
    test: str = "test"
    """Name of the dataset."""
    images: int = Field(2000, ge=2)
    """Images, evenly spread, at most."""
    views: int = Field(10, ge=2)
    """Random crops of each of a tenth of them, for LiDAR."""


ClassificationTask.model_rebuild()

TaskConfig = Annotated[
    Knn
    | Linear
    | Logistic
    | FewShot
    | FineTune
    | ZeroShot
    | ImageText
    | Segmentation
    | KnnSegmentation
    | Depth
    | VideoSegmentation
    | Correspondence
    | Retrieval
    | CopyDetection
    | Corruptions
    | Typographic
    | Representation,
    Field(discriminator="kind"),
]
