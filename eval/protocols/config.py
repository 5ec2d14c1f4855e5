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
    """Name in the report: letters, digits, blanks and ._()+-. null: the kind."""

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
    """Further datasets that the same classifier is scored on (robustness)."""

    def optional_datasets(self) -> list[str]:
        return [each.dataset for each in self.ood_datasets]


class OodDataset(Config):
    """A dataset of the same classes, some of them, or classes that map to them: ImageNet-V2, -A, -R, -Sketch,
    ObjectNet."""

    dataset: str
    """Name of the labeled dataset."""
    classes: str | None = None
    """Path of a YAML or JSON file that maps each class to a class, or a list of classes, of the training set; classes
    left out are not scored. null: classes of the same names."""
    restrict: bool = True
    """Predict only classes that the dataset can contain."""


class LearnedTask(ClassificationTask):
    """What protocols share that learn from labeled images."""

    train: str = "train"
    """Name of the labeled training dataset."""
    select_on: SelectOn = "validation"
    """Data that chooses the settings: validation (a part of the training set) or test (the reported test set, as papers
    do; the score is then optimistic)."""

    def num_candidates(self) -> int:
        """How many settings it chooses among."""
        return 1


class Knn(LearnedTask):
    """Weighted vote of the nearest neighbors (DINO, arXiv 2104.14294, section 4.1)."""

    kind: Literal["knn"] = "knn"
    k: list[PositiveInt] = Field(default_factory=lambda: [10, 20, 100, 200], min_length=1)
    """Numbers of neighbors. The score is that of the chosen one; all are reported."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the votes, exp(cosine / temperature)."""
    per_class: list[PositiveInt] = Field(default_factory=list)
    """Numbers of training images per class to score with, too. Empty: none."""
    num_draws: int = Field(5, ge=1)
    """Number of draws for `per_class`; their mean is reported."""

    def num_candidates(self) -> int:
        return len(self.k)


class Linear(LearnedTask):
    """One linear layer on frozen features, a grid of them trained together (DINOv2, arXiv 2304.07193, section 7.1)."""

    kind: Literal["linear"] = "linear"
    learning_rates: list[PositiveFloat] = Field(default_factory=lambda: list(_LEARNING_RATES), min_length=1)
    """Base learning rates for a batch of 256."""
    blocks: list[PositiveInt] = Field(default_factory=lambda: [1, 4], min_length=1)
    """Numbers of last blocks whose class tokens are concatenated."""
    average_pool: list[bool] = Field(default_factory=lambda: [False, True], min_length=1)
    """Append the mean of the last block's patch tokens, or not."""
    epochs: int = Field(10, ge=1)
    """Number of passes over the training features."""
    min_steps: int = Field(1000, ge=1)
    """Minimum number of steps."""
    batch: int = Field(128, ge=1)
    """Features in a step."""
    views: int = Field(1, ge=1)
    """Number of views of each training image: the center crop, then random crops, flipped or not. DINOv2 takes a new
    crop each time."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that chooses the settings."""

    def num_candidates(self) -> int:
        return len(self.learning_rates) * len(self.blocks) * len(self.average_pool)


class Logistic(LearnedTask):
    """Multinomial logistic regression on frozen features (scikit-learn's, by L-BFGS)."""

    kind: Literal["logistic"] = "logistic"
    C: list[PositiveFloat] = Field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0], min_length=1)
    """Inverse regularization strengths; DINOv2 takes 45 from 1e-6 to 1e5."""
    standardize: bool = True
    """Scale every dimension to mean 0 and deviation 1; DINOv2 does not."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that chooses the settings."""
    max_iterations: int = Field(1000, ge=1)
    """Maximum number of the optimizer's iterations."""

    def num_candidates(self) -> int:
        return len(self.C)


class FewShot(ClassificationTask):
    """Logistic regression on few images a class."""

    kind: Literal["few_shot"] = "few_shot"
    train: str = "train"
    """Name of the labeled training dataset."""
    shots: list[PositiveInt] = Field(default_factory=lambda: [1, 5, 10], min_length=1)
    """Numbers of images per class."""
    num_draws: int = Field(5, ge=2)
    """Number of draws for each of `shots`; their mean is reported with Student's t interval."""
    C: float = Field(100.0, gt=0)
    """Inverse regularization strength, on vectors of unit length."""


class FineTune(LearnedTask):
    """The last blocks and a linear layer trained together."""

    kind: Literal["fine_tune"] = "fine_tune"
    blocks: int = Field(1, ge=0)
    """Number of last blocks to train."""
    learning_rates: list[PositiveFloat] = Field(default_factory=lambda: [1e-4, 5e-4], min_length=1)
    """Learning rates of AdamW."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay of AdamW."""
    epochs: int = Field(10, ge=1)
    """Number of passes over the training images."""
    batch: int = Field(64, ge=1)
    """Images in a step."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that chooses the learning rate."""

    def num_candidates(self) -> int:
        return len(self.learning_rates)


class ZeroShot(ClassificationTask):
    """Classes by the nearest text (CLIP, arXiv 2103.00020, section 3.1)."""

    kind: Literal["zero_shot"] = "zero_shot"
    prompts: str = "plain"
    """Prompt templates: a name in eval/prompts, or the path of a text file with one template a line, `{}` the class."""
    class_names: str | None = None
    """Path of a YAML or JSON file of class names, a mapping or a list. null: the dataset's names."""


class ImageText(Task):
    """Retrieval of captions by images and of images by captions (recall at k)."""

    kind: Literal["image_text"] = "image_text"
    test: str = "test"
    """Name of the captioned dataset."""
    recall_at: list[PositiveInt] = Field(default_factory=lambda: [1, 5, 10], min_length=1)
    """Ranks k of recall at k."""
    captions_per_line: bool = True
    """Count each line of a caption as a caption, as in COCO."""


class DenseTask(Task):
    """What protocols share that judge patch tokens by a map beside each image."""

    train: str = "train"
    """Name of the dataset that is learned from."""
    test: str = "test"
    """Name of the dataset that is scored."""
    grid: int = Field(32, ge=1)
    """Number of patches along each side of the square that images are resized to. A backbone of one size keeps its own.
    """


class SegmentationSettings(DenseTask):
    """What linear and kNN segmentation share."""

    annotation_suffix: str = "seg.png"
    """Extension of the mask beside each image, with one class number for each pixel."""
    ignore: list[int] = Field(default_factory=lambda: [255])
    """Class numbers that are neither trained on nor scored."""


class Segmentation(SegmentationSettings):
    """A linear layer on patch tokens (DINOv2, section 7.4: linear)."""

    kind: Literal["segmentation"] = "segmentation"
    learning_rates: list[PositiveFloat] = Field(default_factory=lambda: [1e-3, 1e-2], min_length=1)
    """Learning rates of AdamW; `validation_fraction` chooses among them."""
    weight_decay: float = Field(1e-3, ge=0)
    """Weight decay of AdamW."""
    steps: int = Field(2000, ge=1)
    """Number of training steps."""
    batch: int = Field(16, ge=1)
    """Images in a step."""
    validation_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the training images that chooses the learning rate."""


class KnnSegmentation(SegmentationSettings):
    """kNN on patch tokens: weighted votes of the most similar patches of the training images."""

    kind: Literal["knn_segmentation"] = "knn_segmentation"
    k: int = Field(20, ge=1)
    """Number of neighbors."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the votes, exp(cosine / temperature)."""
    bank_size: int = Field(200_000, ge=1)
    """Maximum number of training patches, sampled at random."""


class Depth(DenseTask):
    """Depth in bins by a linear layer on patch tokens (DINOv2, section 7.4; AdaBins' bins)."""

    kind: Literal["depth"] = "depth"
    annotation_suffix: str = "depth.png"
    """Extension of the depth map beside each image: a 16-bit PNG, 0 where the depth is unknown."""
    scale: float = Field(0.001, gt=0)
    """Meters per unit of the map."""
    nearest: float = Field(0.001, gt=0)
    """Minimum depth in meters."""
    farthest: float = Field(10.0, gt=0)
    """Maximum depth in meters; farther pixels are not scored."""
    bins: int = Field(256, ge=2)
    """Number of evenly spaced bins between them."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of AdamW."""
    steps: int = Field(2000, ge=1)
    """Number of training steps."""
    batch: int = Field(16, ge=1)
    """Images in a step."""


class VideoSegmentation(Task):
    """Propagation of a video's first mask by patch similarity (DINO, section 4.2.2; DAVIS 2017: J and F)."""

    kind: Literal["video_segmentation"] = "video_segmentation"
    test: str = "test"
    """Name of the dataset: frames in the order of their keys, a folder for each video, each frame with a mask of object
    numbers."""
    annotation_suffix: str = "seg.png"
    """Extension of the mask beside each frame."""
    grid: int = Field(30, ge=1)
    """Number of patches along the shorter side of a frame."""
    num_context_frames: int = Field(7, ge=1)
    """Number of previous frames to propagate from, beside the first."""
    num_neighbors: int = Field(5, ge=1)
    """Number of nearest patches to propagate from."""
    radius: int = Field(12, ge=1)
    """Maximum motion between frames in patches."""
    temperature: float = Field(0.1, gt=0)
    """Temperature of the weights, exp(cosine / temperature)."""


class Correspondence(Task):
    """Match of keypoints between images by the most similar patch token (SPair-71k: PCK)."""

    kind: Literal["correspondence"] = "correspondence"
    test: str = "test"
    """Name of the dataset that contains both images of each pair."""
    pairs: str
    """Path of a JSON file: a list of {source, target, source_points, target_points, size}: keys, points [x, y] in
    pixels, and the larger side of the object's box in the target."""
    alpha: float = Field(0.1, gt=0)
    """Share of `size` within which a point is correct."""
    grid: int = Field(32, ge=1)
    """Number of patches along each side of the square that images are resized to."""


class Retrieval(Task):
    """Instance retrieval (Oxford and Paris, revisited: arXiv 1803.11285): mean average precision, medium and hard."""

    kind: Literal["retrieval"] = "retrieval"
    test: str = "test"
    """Name of the dataset to search."""
    queries: str = "queries"
    """Name of the dataset of queries."""
    ground_truth: str
    """Path of a JSON file: for each query's key {easy, hard, junk}, lists of keys, and `box` [left, top, right, bottom]
    that the query is cropped to."""


class CopyDetection(Task):
    """Detection of copies among distractors: micro average precision over all pairs (DISC21, arXiv 2106.09672)."""

    kind: Literal["copy_detection"] = "copy_detection"
    test: str = "test"
    """Name of the dataset of references."""
    queries: str = "queries"
    """Name of the dataset of queries."""
    ground_truth: str
    """Path of a JSON file: for each query that is a copy, the keys of its originals."""
    num_candidates: int = Field(10, ge=1)
    """Number of references to rank for each query."""


class Corruptions(Task):
    """kNN accuracy on images with ImageNet-C's corruptions (arXiv 1903.12261), made on the fly."""

    kind: Literal["corruptions"] = "corruptions"
    train: str = "train"
    """Name of the labeled dataset of neighbors."""
    test: str = "test"
    """Name of the labeled dataset to corrupt."""
    corruptions: list[str] = Field(default_factory=list)
    """Names of the corruptions. Empty: all."""
    severities: list[int] = Field(default_factory=lambda: [1, 3, 5], min_length=1)
    """Severities, 1 to 5."""
    images: int = Field(1000, ge=1)
    """Maximum number of test images, evenly spaced."""
    k: int = Field(20, ge=1)
    """Number of neighbors."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the votes, exp(cosine / temperature)."""

    @model_validator(mode="after")
    def _severe(self) -> Corruptions:
        if any(not 1 <= each <= 5 for each in self.severities):
            raise ValueError(f"severities {self.severities}: from 1 to 5")
        return self


class Typographic(Task):
    """Zero-shot accuracy on images with the name of another class written on them."""

    kind: Literal["typographic"] = "typographic"
    test: str = "test"
    """Name of the labeled dataset."""
    prompts: str = "plain"
    """Prompt templates: a name in eval/prompts, or the path of a text file with one template a line, `{}` the class."""
    class_names: str | None = None
    """Path of a YAML or JSON file of class names, a mapping or a list. null: the dataset's names."""


class Representation(Task):
    """Use of the feature space: RankMe, LiDAR, alpha-ReQ, norms of patch tokens, use of prototypes."""

    kind: Literal["representation"] = "representation"
    test: str = "test"
    """Name of the dataset."""
    images: int = Field(2000, ge=2)
    """Maximum number of images, evenly spaced."""
    views: int = Field(10, ge=2)
    """Number of random crops of each image of a tenth of them, for LiDAR."""


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
