"""What gives images numbers: how well a caption fits, how pleasing or unsafe they are, or anything of the user's."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.similarity.exact import widened
from curation.steps.config import CaptionScorer, FieldScorer, HeadScorer, PluginScorer, ScorerConfig, TableScorer
from curation.steps.preference import json_fields, number
from infra import storage
from infra.embeddings import backbone_of
from infra.errors import UserError

if TYPE_CHECKING:
    from curation.context import Context

_BATCH = 256
Scores = np.ndarray
"""Float64 `[rows]`; NaN for images that have none"""


def scores(context: Context, config: ScorerConfig, rows: np.ndarray) -> Scores:
    """Scores of some rows of the corpus.

    Raises:
        UserError: the scorer's file is missing or does not fit.
    """
    return _OF[config.kind](context, config, rows)


def _of_field(context: Context, config: FieldScorer, rows: np.ndarray) -> Scores:
    found = [number(each) for each in json_fields(context, rows, config.field)]
    return np.array([np.nan if each is None else each for each in found])


def _of_table(context: Context, config: TableScorer, rows: np.ndarray) -> Scores:
    try:
        with storage.open_read(config.table) as file:
            table = pq.read_table(file, columns=["key", config.column])
    except (pa.ArrowInvalid, KeyError) as error:
        raise UserError(f"{config.table}: no parquet file with columns key and {config.column}: {error}") from None
    place = pc.index_in(context.corpus.table["key"].take(pa.array(rows)), value_set=table["key"])
    return table[config.column].cast(pa.float64()).take(place.combine_chunks()).to_numpy(zero_copy_only=False)


def _of_head(context: Context, config: HeadScorer, rows: np.ndarray) -> Scores:
    head = Head(config)
    blocks = (context.vectors.take(rows[some]) for some in _batches(len(rows)))
    return np.concatenate([head(widened(block)) for block in blocks])


class Head:
    """A few linear layers on embeddings, as aesthetic and NSFW predictors are given out.

    Raises:
        UserError: the checkpoint holds no linear layers that follow one another.
    """

    def __init__(self, config: HeadScorer) -> None:
        from pretrain import weights

        state = weights.read(config.checkpoint)
        state = state.get("state_dict", state) if isinstance(state, dict) else {}
        names = [name.removesuffix("weight") for name, value in state.items() if getattr(value, "ndim", 0) == 2]
        self.layers = [_linear(state, name) for name in names]
        sizes = [weight.shape for weight, _ in self.layers]
        if not sizes or any(below[0] != above[1] for below, above in pairwise(sizes)):
            raise UserError(f"{config.checkpoint}: no linear layers that follow one another; is it a head?")
        self.config = config

    def __call__(self, vectors: np.ndarray) -> Scores:
        """Scores of vectors, float32 `[n, dim]`."""
        found = vectors.astype(np.float64)
        if found.shape[1] != self.layers[0][0].shape[1]:
            needed = self.layers[0][0].shape[1]
            raise UserError(f"{self.config.checkpoint}: for vectors of {needed} dimensions, not {found.shape[1]}")
        for depth, (weight, bias) in enumerate(self.layers):
            found = found @ weight.T + bias
            if depth < len(self.layers) - 1 and self.config.activation == "relu":
                found = np.maximum(found, 0)
        if self.config.output == "softmax":
            found = np.exp(found - found.max(axis=1, keepdims=True))
            found /= found.sum(axis=1, keepdims=True)
        elif self.config.output == "sigmoid":
            found = 1 / (1 + np.exp(-found))
        return found[:, self.config.unit]


def _linear(state: Mapping[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Weight and bias of a layer, float64; one without a bias has zeros."""
    weight, bias = state[f"{name}weight"].double().numpy(), state.get(f"{name}bias")
    return weight, np.zeros(len(weight)) if bias is None else bias.double().numpy()


def _of_caption(context: Context, config: CaptionScorer, rows: np.ndarray) -> Scores:
    from pretrain import backbones

    embedded = context.inputs.embeddings
    assert embedded is not None
    if embedded.backbone != backbone_of(*backbones.identity(config.model)):
        raise UserError(f"score: {embedded.artifact.url}: not by {config.model.checkpoint}; embed with that model")
    text, column = backbones.OpenClipText(config.model), context.corpus.table["caption"]
    found = np.full(len(rows), np.nan)
    for some in _batches(len(rows)):
        captions = column.take(pa.array(rows[some])).to_pylist()
        there = np.flatnonzero([bool(each) for each in captions])
        if len(there):
            texts = text.features([captions[place] for place in there])
            images = widened(context.vectors.take(rows[some][there]))
            found[np.arange(some.start, some.stop)[there]] = np.einsum("ij,ij->i", images, texts)
    return found


def _of_plugin(context: Context, config: PluginScorer, rows: np.ndarray) -> Scores:
    from pretrain.data.decode import decode_rgb

    try:
        score: Callable[[Sequence[Any]], Sequence[float]] = pkgutil.resolve_name(config.name)(config.checkpoint)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"score: {config.name}: {error}; name something importable as package.module:name") from None
    found = []
    for some in _batches(len(rows)):
        found.append(np.asarray(score([decode_rgb(context.corpus.read_image(row)) for row in rows[some].tolist()])))
        context.reach(some.stop / len(rows))
    return np.concatenate(found).astype(np.float64)


def _batches(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH))


_OF: Mapping[str, Callable[[Context, Any, np.ndarray], Scores]] = {
    "field": _of_field,
    "table": _of_table,
    "head": _of_head,
    "caption": _of_caption,
    "plugin": _of_plugin,
}
