"""Which function scores which task, and what each needs of a backbone."""

from __future__ import annotations

from collections.abc import Callable

from eval.bench import Bench
from eval.scores import Outcome
from eval.subject import Subject
from eval.tasks import texts
from eval.tasks.config import TaskConfig
from eval.tasks.correspondence import correspondence
from eval.tasks.corruptions import corruptions
from eval.tasks.depth import depth
from eval.tasks.fine_tune import fine_tune
from eval.tasks.health import health
from eval.tasks.knn import knn
from eval.tasks.linear import linear
from eval.tasks.logistic import few_shot, logistic
from eval.tasks.propagation import propagation
from eval.tasks.retrieval import copy_detection, retrieval
from eval.tasks.segmentation import knn_segmentation, segmentation
from pretrain import image_text
from pretrain.backbones import TokenBackbone
from pretrain.config import BackboneConfig, PixelDescriptor

_RUN: dict[str, Callable[..., Outcome]] = {
    "knn": knn,
    "linear": linear,
    "logistic": logistic,
    "few_shot": few_shot,
    "fine_tune": fine_tune,
    "zero_shot": texts.zero_shot,
    "image_text": texts.image_text,
    "segmentation": segmentation,
    "knn_segmentation": knn_segmentation,
    "depth": depth,
    "propagation": propagation,
    "correspondence": correspondence,
    "retrieval": retrieval,
    "copy_detection": copy_detection,
    "corruptions": corruptions,
    "typographic": texts.typographic,
    "health": health,
}
_OF_VECTORS = {"knn", "linear", "logistic", "few_shot", "retrieval", "copy_detection"}
_OF_TEXTS = {"zero_shot", "image_text", "typographic"}
_OF_TOKENS = {"segmentation", "knn_segmentation", "depth", "propagation", "correspondence", "health"}


def run(task: TaskConfig, subject: Subject, bench: Bench) -> Outcome:
    """Score a backbone by one task.

    Raises:
        UserError: the backbone or a dataset lacks what it takes.
    """
    return _RUN[task.kind](task, subject, bench)


def lack(task: TaskConfig, subject: Subject) -> str | None:
    """What a backbone lacks for a task; None where it can be scored."""
    if task.kind in _OF_TEXTS and not image_text.has_texts(subject.config):
        return "a text tower"
    if task.kind in _OF_TOKENS - {"health"} and not isinstance(subject.backbone, TokenBackbone):
        return "patch tokens"
    return None


def of_baseline(task: TaskConfig, backbone: BackboneConfig) -> bool:
    """Whether a baseline is worth scoring: by what its vectors say, or, of a network, its patch tokens."""
    return task.kind in (_OF_VECTORS if isinstance(backbone, PixelDescriptor) else _OF_VECTORS | _OF_TOKENS)
