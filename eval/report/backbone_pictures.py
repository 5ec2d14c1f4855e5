"""Pictures of a backbone that belong to no protocol."""

from __future__ import annotations

from eval.context import EvalContext
from eval.eval_model import EvalModel
from eval.report.pictures.patches import attention_maps, patch_pca
from eval.report.pictures.plane import embedding_map
from pretrain.backbones.base import TokenBackbone
from pretrain.backbones.checkpoint_backbone import VitCheckpointBackbone

_LEAST = 8  # images on a plane


def draw_backbone_pictures(model: EvalModel, context: EvalContext) -> dict[str, bytes]:
    """Principal components of patches, attention of the class token, and images on a plane; PNG by name."""
    name = next((each for each in ("test", *sorted(context.corpora)) if each in context.corpora), None)
    if name is None:
        return {}
    corpus, count, pictures = context.corpus(name), context.settings.pictures, {}
    if isinstance(model.backbone, TokenBackbone):
        pictures["pca"] = patch_pca(model.backbone, corpus, count)
    if isinstance(model.backbone, VitCheckpointBackbone):
        pictures["attention"] = attention_maps(model.backbone, corpus, min(count, 5))
    if len(corpus) >= _LEAST:
        labeled = not corpus.table["label"].null_count
        names = context.class_names(name) if labeled else []
        labels = corpus.labels if labeled else None
        pictures["map"] = embedding_map(model.vectors(corpus), labels, names, context.settings.seed)
    return pictures
