"""DeiT (arXiv 2012.12877, section 4): classes by labels and, through a distillation token, by a classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from distill.objectives.config import DeitConfig
from pretrain.data.loader import Batch
from pretrain.objectives.base import BackboneWidths, Objective, Outputs

CLASSIFIER = "deit"
"""Name of the teacher whose class token stands for its logits."""


class Deit(Objective):
    """Cross-entropy of the class token to the labels and of the distillation token to the classifier."""

    def __init__(self, config: DeitConfig, student: BackboneWidths, classes: int) -> None:
        super().__init__(config.weight)
        self.config = config
        self.by_label = _linear(student.embed_dim, classes)
        self.by_teacher = _linear(student.embed_dim, classes)

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`deit_labels` and `deit_teacher`, means over the global crops."""
        features, share = outputs.masked_student_globals, self.config.distillation_weight
        token = features.class_token if features.registers is None else features.registers[:, 0]
        logits, taught = self.by_teacher(token).float(), outputs.teachers.features(CLASSIFIER).class_token.float()
        labels = batch.labels.repeat(len(token) // len(batch.labels))
        return {
            "deit_labels": (1 - share) * F.cross_entropy(self.by_label(features.class_token).float(), labels),
            "deit_teacher": share * self._distilled(logits, taught),
        }

    def _distilled(self, logits: Tensor, taught: Tensor) -> Tensor:
        """Equation 3 where the teacher is hard, else the second term of equation 2."""
        if self.config.mode == "hard":
            return F.cross_entropy(logits, taught.argmax(1))
        t = self.config.temperature
        wanted, found = (taught / t).log_softmax(-1), (logits / t).log_softmax(-1)
        return t * t * F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def _linear(dim: int, classes: int) -> nn.Linear:
    layer = nn.Linear(dim, classes)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer
