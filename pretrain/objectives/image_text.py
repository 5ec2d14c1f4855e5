"""CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343): images and captions in one space.

Text tower and tokenizer are open_clip's. Features of all ranks are gathered with their gradients, and each rank
computes only the rows of its own images (and captions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.data.loader import Batch
from pretrain.distributed import all_gather_with_grad, first_gathered_row
from pretrain.objectives.base import BackboneWidths, Objective, Outputs
from pretrain.objectives.config import ClipConfig, SiglipConfig, TextTower

_LARGEST_SCALE = math.log(100)  # section 2.5


def tokenizer(text: TextTower) -> Callable[[Sequence[str]], Tensor]:
    """Captions to token ids, int64 `[n, context]`, by open_clip's byte pairs."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenize = SimpleTokenizer(context_length=text.context)
    return lambda captions: tokenize(list(captions))


class ImageText(Objective):
    """An image projection, a text tower and a learned scale of the cosines between them.

    The images are the first global crops, in a pass of their own, for they must not be masked.
    """

    def __init__(self, config: ClipConfig | SiglipConfig, student: BackboneWidths, teacher: BackboneWidths) -> None:
        from open_clip.transformer import QuickGELU, TextTransformer

        super().__init__(config.weight)
        self.config = config
        self.project = nn.Linear(student.embed_dim, config.embed_dim, bias=False)
        nn.init.normal_(self.project.weight, std=student.embed_dim**-0.5)
        text = config.text
        self.text = TextTransformer(
            context_length=text.context,
            width=text.width,
            heads=text.num_heads,
            layers=text.layers,
            output_dim=config.embed_dim,
            act_layer=nn.GELU if text.activation == "gelu" else QuickGELU,
        )
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.scale)]))  # DeepSpeed refuses scalars

    def encode_images(self, class_tokens: Tensor) -> Tensor:
        """`[B, student dim]` to unit vectors `[B, dim]`, float32."""
        return F.normalize(self.project(class_tokens).float(), dim=-1)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Token ids `[B, context]` to unit vectors `[B, dim]`, float32."""
        return F.normalize(self.text(tokens).float(), dim=-1)

    def forward(self, outputs: Outputs, batch: Batch, temperature: float) -> dict[str, Tensor]:
        """`clip` or `siglip`"""
        images = outputs.images[: len(batch.positions)]
        image = self.encode_images(outputs.student([images])[0].class_token)
        text = self.encode_texts(batch.texts)
        with torch.autocast(image.device.type, enabled=False):  # bf16 would round logits of 64 to quarters
            return self.contrast(image, text)

    def contrast(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """The loss of unit vectors `[B, dim]`, row i of the images belonging to row i of the captions."""
        raise NotImplementedError

    def scale(self) -> Tensor:
        """The cosines' factor, at most 100; at the bound the gradient still passes, so that it can fall again."""
        bounded = self.logit_scale.clamp(0, _LARGEST_SCALE)
        return (self.logit_scale + (bounded - self.logit_scale).detach()).exp()


class Clip(ImageText):
    """Symmetric cross-entropy between images and captions (section 2.3, figure 3)."""

    def contrast(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        own = torch.arange(len(image), device=image.device) + first_gathered_row(len(image))
        by_image = F.cross_entropy(self.scale() * image @ all_gather_with_grad(text).T, own)
        by_text = F.cross_entropy(self.scale() * text @ all_gather_with_grad(image).T, own)
        return {"clip": (by_image + by_text) / 2}


class Siglip(ImageText):
    """A sigmoid for every pair of an image and a caption (algorithm 1)."""

    def __init__(self, config: SiglipConfig, student: BackboneWidths, teacher: BackboneWidths) -> None:
        super().__init__(config, student, teacher)
        self.logit_bias = nn.Parameter(torch.tensor([config.bias]))

    def scale(self) -> Tensor:
        return self.logit_scale.exp()

    def contrast(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        logits = self.scale() * image @ all_gather_with_grad(text).T + self.logit_bias
        signs = -torch.ones_like(logits)
        signs.diagonal(first_gathered_row(len(image))).fill_(1)
        return {"siglip": -F.logsigmoid(signs * logits).sum() / len(image)}
