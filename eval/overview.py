"""Pictures of a backbone that belong to no protocol."""

from __future__ import annotations

from eval.bench import Bench
from eval.pictures.patches import attention_maps, patch_pca
from eval.pictures.plane import embedding_map
from eval.subject import Subject
from pretrain.backbones import CheckpointedViT, TokenBackbone

_LEAST = 8  # images on a plane


def overview(subject: Subject, bench: Bench) -> dict[str, bytes]:
    """Principal components of patches, attention of the class token, and images on a plane; PNG by name."""
    name = next((each for each in ("test", *sorted(bench.corpora)) if each in bench.corpora), None)
    if name is None:
        return {}
    corpus, count, pictures = bench.corpus(name), bench.settings.pictures, {}
    if isinstance(subject.backbone, TokenBackbone):
        pictures["pca"] = patch_pca(subject.backbone, corpus, count)
    if isinstance(subject.backbone, CheckpointedViT):
        pictures["attention"] = attention_maps(subject.backbone, corpus, min(count, 5))
    if len(corpus) >= _LEAST:
        labelled = not corpus.table["label"].null_count
        names = bench.class_names(name) if labelled else []
        labels = corpus.labels if labelled else None
        pictures["map"] = embedding_map(subject.vectors(corpus), labels, names, bench.settings.seed)
    return pictures
