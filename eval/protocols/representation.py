"""Whether representations use the space they have: measures that need no labels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from eval.context import EvalContext
from eval.data.views import make_view
from eval.eval_model import EvalModel
from eval.protocols.config import Representation
from eval.stats.scores import ProtocolResult, Score, Scorer
from infra.corpus.corpus import Corpus
from infra.progress import progress
from pretrain.backbones.base import TokenBackbone
from pretrain.backbones.config import CheckpointBackboneConfig
from pretrain.checkpoint.artifact import Checkpoint
from pretrain.data.images import read_image
from pretrain.models.config import VisionTransformerConfig
from pretrain.models.heads import DINOHead
from pretrain.monitoring.collapse_metrics import rankme
from pretrain.objectives.config import DinoConfig

_RIDGE = 1e-4  # LiDAR's, on the within-image scatter
_OUTLIER = 2.0  # times the median norm
_TENTH = 10
_RANKS = (10, 100)  # of the eigenvalues whose fall is measured


def representation(task: Representation, model: EvalModel, context: EvalContext) -> ProtocolResult:
    """RankMe, LiDAR, alpha-ReQ, norms of patch tokens and use of prototypes, as far as the backbone has them."""
    corpus, scorer = context.corpus(task.test), context.scorer(task, model.name)
    rows = np.unique(np.linspace(0, len(corpus) - 1, min(task.images, len(corpus))).astype(int))
    vectors = model.features_of(corpus).raw()[rows]
    few = rows[:: max(len(rows) // max(len(rows) // _TENTH, 2), 1)]
    views = _views(model, corpus, few, task.views, context.settings.seed)
    scores = [
        scorer.score_value(
            "RankMe", float(rankme(torch.from_numpy(vectors))), len(rows), f"of {vectors.shape[1]} dimensions"
        ),
        scorer.score_value("LiDAR", lidar(views), len(few), f"{task.views} crops each"),
        scorer.score_value(
            "alpha-ReQ", alpha_req(vectors), len(rows), "1 is best; 0 is flat, more falls too fast", better="neither"
        ),
    ]
    if isinstance(model.backbone, TokenBackbone):
        scores += _norms(model.backbone, corpus, few, scorer)
    return ProtocolResult([*scores, *_prototypes(model, vectors, scorer)])


def _views(model: EvalModel, corpus: Corpus, rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Vectors of random crops, float32 `[images, count, dim]`."""
    found = []
    with progress(f"crops of {model.name}", len(rows)) as advance:
        for row in rows.tolist():
            image = read_image(corpus, row)
            crops = torch.stack([make_view(model.backbone, image, row, 1 + number, seed) for number in range(count)])
            found.append(model.backbone.features(crops).numpy())
            advance()
    return np.stack(found)


def lidar(views: np.ndarray) -> float:
    """LiDAR (arXiv 2312.04000, equations 1 to 3): effective rank of what tells images apart, beside what tells crops of
    one image apart.

    Args:
        views: vectors `[images, crops, dim]`.
    """
    means = views.mean(1, dtype=np.float64)
    within = (views - means[:, None]).reshape(-1, views.shape[2])
    scatter = within.T @ within / max(len(within) - len(views), 1) + _RIDGE * np.eye(views.shape[2])
    between = means - means.mean(0)
    values, directions = np.linalg.eigh(scatter)
    whitened = between @ directions / np.sqrt(values)
    spectrum = np.linalg.svd(whitened, compute_uv=False) ** 2
    return float(np.exp(_entropy(spectrum)))


def _entropy(values: np.ndarray) -> float:
    shares = values / max(values.sum(), 1e-30)
    return float(-(shares * np.log(np.maximum(shares, 1e-30))).sum())


def alpha_req(vectors: np.ndarray) -> float:
    """alpha-ReQ (arXiv 2202.05808): how fast the eigenvalues of the covariance fall, the slope on logarithmic scales
    between the 10th and the 100th; of few eigenvalues between the first and the last.

    Args:
        vectors: `[n, dim]`.
    """
    centered = vectors - vectors.mean(0, dtype=np.float64)
    values = np.linalg.svd(centered, compute_uv=False) ** 2 / len(vectors)
    values = values[values > values[0] * 1e-10] if values[0] > 0 else values[:0]
    first, last = (_RANKS[0], min(_RANKS[1], len(values))) if len(values) > 2 * _RANKS[0] else (1, len(values))
    if last - first < 2:
        return float("inf")
    slope, _ = np.polyfit(np.log(np.arange(first, last + 1)), np.log(values[first - 1 : last]), 1)
    return float(-slope)


def _norms(backbone: TokenBackbone, corpus: Corpus, rows: np.ndarray, scorer: Scorer) -> Iterator[Score]:
    """Artifacts that registers mend (arXiv 2309.16588): few patch tokens of far greater norm than others, before the
    final norm."""
    images = [torch.as_tensor(np.array(backbone.preprocess(read_image(corpus, int(row))))) for row in rows]
    norms = torch.cat(
        [backbone.layers(each[None], 1, norm=False)[1][-1].patch_tokens.norm(dim=-1).flatten().cpu() for each in images]
    )
    share = float((norms > _OUTLIER * norms.median()).float().mean())
    note = f"norm over {_OUTLIER:g} times the median"
    yield scorer.score_value("outlying patch tokens", share, len(rows), note, is_fraction=True, better="lower")


def _prototypes(model: EvalModel, vectors: np.ndarray, scorer: Scorer) -> Iterator[Score]:
    """How evenly a teacher uses its DINO prototypes: entropy of the mean assignment, as a share of the most."""
    config = model.config
    if not isinstance(config, CheckpointBackboneConfig) or config.untrained:
        return
    checkpoint = Checkpoint.open(config.url)
    dino = next((each for each in checkpoint.description.objectives if isinstance(each, DinoConfig)), None)
    if dino is None or checkpoint.description.released != "teacher":
        return
    assert isinstance(checkpoint.model, VisionTransformerConfig)
    assert checkpoint.description.temperature is not None
    head = DINOHead(checkpoint.model.embed_dim, dino.head).eval()
    head.load_state_dict(checkpoint.weights("objectives.dino.teacher_head."))
    temperature = checkpoint.description.temperature
    with torch.no_grad():
        assigned = (head(torch.from_numpy(vectors)) / temperature).softmax(-1)
    mean, chosen = assigned.mean(0).numpy(), len(assigned.argmax(1).unique())
    usage = min(_entropy(mean) / np.log(min(len(vectors), len(mean))), 1.0)
    yield scorer.score_value(
        "prototype usage", usage, len(vectors), f"{chosen} of {len(mean)} chosen", is_fraction=True
    )
