"""SimMIM (arXiv 2111.09886): pixels of masked patch tokens by one linear layer."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.data.loader import Batch
from pretrain.models.config import VisionTransformerConfig
from pretrain.objectives.base import Objective, Outputs
from pretrain.objectives.config import SimmimConfig
from pretrain.objectives.mae import patchify


class Simmim(Objective):
    """Mean absolute error of the normalized pixels under the masks of the global crops (section 3.3)."""

    def __init__(
        self, config: SimmimConfig, student: VisionTransformerConfig, teacher: VisionTransformerConfig
    ) -> None:
        super().__init__(config.weight)
        self.patch_size = student.patch_size
        self.pixels = nn.Linear(student.embed_dim, 3 * student.patch_size**2)

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`simmim`"""
        predicted = self.pixels(outputs.masked_student_globals.patch_tokens.flatten(0, 1)[batch.mask_indices])
        target = patchify(outputs.images, self.patch_size).flatten(0, 1)[batch.mask_indices]
        return {"simmim": (predicted.float() - target.float()).abs().sum() / max(1, target.numel())}
