"""Gram anchoring (DINOv3, arXiv 2508.10104, section 4.2): patch tokens keep the likeness an earlier teacher saw."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.data.loader import Batch
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.positions import Grid, resample_pos_embed
from pretrain.models.timm_network import Network
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.base import Objective, Outputs
from pretrain.objectives.config import GramConfig


def gram_loss(student: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared difference of the cosines between all patch tokens of an image, of two `[B, patches, dim]`.

    The widths may differ.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, anchor = (F.normalize(tokens.float(), dim=-1) for tokens in (student, anchor))
        return F.mse_loss(student @ student.transpose(1, 2), anchor @ anchor.transpose(1, 2))


class Gram(Objective):
    """Anchors the student's global crops to a frozen copy of the teacher, which sees them larger and undistorted."""

    def __init__(self, config: GramConfig, student: VisionTransformerConfig, teacher: VisionTransformerConfig) -> None:
        super().__init__(config.weight)
        self.config = config
        self.anchor = VisionTransformer(teacher).requires_grad_(False).eval()
        self.started = False

    def train(self, mode: bool = True) -> Gram:
        super().train(mode)
        self.anchor.eval()
        return self

    def begin_step(self, step: int, teacher: nn.Module | None) -> Iterator[tuple[nn.Module, nn.Module]]:
        assert teacher is not None
        since = step - self.config.start_step
        self.started = since >= 0
        turn, left = divmod(since, self.config.update_every)
        if left == 0 and 0 <= turn <= self.config.max_updates:
            yield teacher, self.anchor

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`gram`, from the first step on."""
        if not self.started:
            return {}
        images = outputs.images if outputs.gram_images is None else outputs.gram_images
        with torch.no_grad():
            anchor = self.anchor([images])[0].patch_tokens
            # Plainly, as dinov3's global_teacher_resize_antialias: false.
            anchor = resample_pos_embed(
                anchor, _grid(images, self.anchor), _grid(outputs.images, outputs.student), "plain"
            )
        return {"gram": gram_loss(outputs.masked_student_globals.patch_tokens, anchor)}


def _grid(images: Tensor, backbone: Network) -> Grid:
    patch = backbone.patch_size
    return images.shape[-2] // patch, images.shape[-1] // patch
