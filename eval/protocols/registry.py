"""The protocols: the function that scores each kind of task, and what it reads of a backbone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from eval.context import EvalContext
from eval.eval_model import EvalModel
from eval.protocols.config import TaskConfig
from eval.protocols.correspondence import correspondence
from eval.protocols.corruptions import corruptions
from eval.protocols.depth import depth
from eval.protocols.fine_tune import fine_tune
from eval.protocols.image_text import image_text
from eval.protocols.knn import knn
from eval.protocols.linear import linear
from eval.protocols.logistic import few_shot, logistic
from eval.protocols.representation import representation
from eval.protocols.retrieval import copy_detection, retrieval
from eval.protocols.segmentation import knn_segmentation, segmentation
from eval.protocols.video_segmentation import video_segmentation
from eval.protocols.zero_shot import typographic, zero_shot
from eval.stats.scores import ProtocolResult
from pretrain.backbones.base import TokenBackbone
from pretrain.backbones.config import BackboneConfig, PixelDescriptorConfig
from pretrain.backbones.image_text import has_texts


@dataclass(frozen=True)
class Protocol:
    """One protocol."""

    run: Callable[..., ProtocolResult]
    """Called with the task, the model and the context."""
    reads: Literal["vectors", "patch_tokens", "texts", "network"]
    """What it reads of a backbone: vectors alone, patch tokens, a text tower beside vectors, or the network itself."""
    works_without: bool = False
    """Whether a backbone that lacks it is scored on the rest."""


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(knn, "vectors"),
    "linear": Protocol(linear, "vectors"),
    "logistic": Protocol(logistic, "vectors"),
    "few_shot": Protocol(few_shot, "vectors"),
    "fine_tune": Protocol(fine_tune, "network"),
    "zero_shot": Protocol(zero_shot, "texts"),
    "image_text": Protocol(image_text, "texts"),
    "segmentation": Protocol(segmentation, "patch_tokens"),
    "knn_segmentation": Protocol(knn_segmentation, "patch_tokens"),
    "depth": Protocol(depth, "patch_tokens"),
    "video_segmentation": Protocol(video_segmentation, "patch_tokens"),
    "correspondence": Protocol(correspondence, "patch_tokens"),
    "retrieval": Protocol(retrieval, "vectors"),
    "copy_detection": Protocol(copy_detection, "vectors"),
    "corruptions": Protocol(corruptions, "network"),
    "typographic": Protocol(typographic, "texts"),
    "representation": Protocol(representation, "patch_tokens", works_without=True),
}
"""By the kind of their task."""


def run(task: TaskConfig, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """Score a backbone by one task.

    Raises:
        UserError: the backbone or a dataset lacks what the protocol reads.
    """
    return PROTOCOLS[task.kind].run(task, model, context)


def missing_capability(task: TaskConfig, model: EvalModel) -> str | None:
    """What a backbone lacks for a task; None where it can be scored."""
    protocol = PROTOCOLS[task.kind]
    if protocol.reads == "texts" and not has_texts(model.config):
        return "a text tower"
    if (
        protocol.reads == "patch_tokens"
        and not protocol.works_without
        and not isinstance(model.backbone, TokenBackbone)
    ):
        return "patch tokens"
    return None


def applies_to_baseline(task: TaskConfig, backbone: BackboneConfig) -> bool:
    """Whether a baseline is worth scoring: pixels on vectors, an untrained network on its patch tokens too."""
    reads = PROTOCOLS[task.kind].reads
    return reads == "vectors" or (reads == "patch_tokens" and not isinstance(backbone, PixelDescriptorConfig))
