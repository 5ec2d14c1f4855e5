"""CLIP distillation: a student's image and text towers learn how an open_clip model tells pairs apart."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distill.objectives.config import ClipDistillConfig
from pretrain.data.loader import Batch
from pretrain.distributed import is_distributed, rank_and_world_size
from pretrain.objectives.base import BackboneWidths, Objective, Outputs
from pretrain.objectives.config import ClipConfig
from pretrain.objectives.image_text import Clip


class TextTeacher(Protocol):
    """What a frozen CLIP model says of captions."""

    scale: float
    """Factor of its cosines."""

    def texts(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, context]` to unit vectors `[B, dim]`."""


class ClipDistill(Objective):
    """open_clip's DistillClipLoss on the first global crops and their captions, over all ranks."""

    def __init__(self, config: ClipDistillConfig, student: BackboneWidths, teacher: TextTeacher) -> None:
        from open_clip.loss import DistillClipLoss

        super().__init__(config.weight)
        self.config = config
        self.towers = Clip(build_towers(config), student, student)
        self.__dict__["teacher"] = teacher  # frozen, no part of what is trained or saved
        rank, world_size = rank_and_world_size() if is_distributed() else (0, 1)
        self._loss = DistillClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`clip_distill_contrastive` and `clip_distill`"""
        teacher: TextTeacher = self.__dict__["teacher"]
        name, count = self.config.teacher, len(batch.positions)
        image = self.towers.encode_images(outputs.masked_student_globals.class_token[:count])
        text = self.towers.encode_texts(batch.texts)
        seen = torch.nn.functional.normalize(outputs.teachers.features(name).class_token[:count].float(), dim=-1)
        said = outputs.teachers.cached(f"{name} texts", lambda: teacher.texts(batch.texts))
        with torch.autocast(image.device.type, enabled=False):  # bf16 would round logits of 64 to quarters
            contrast, distill = self._loss(image, text, self.towers.scale(), seen, said.float(), teacher.scale)
        return {"clip_distill_contrastive": self.config.contrastive_weight * contrast, "clip_distill": distill}


def build_towers(config: ClipDistillConfig) -> ClipConfig:
    """The objective whose modules the student's towers are."""
    return ClipConfig(embed_dim=config.embed_dim, text=config.text, scale=config.scale)
