"""What gives images numbers: how well a caption fits, how pleasing or unsafe they are, or anything of the user's."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation.similarity.exact import widen
from curation.steps.config import CaptionScorer, FieldScorer, HeadScorer, PluginScorer, ScorerConfig, TableScorer
from infra.corpus.arrow import index_in, take_chunked
from infra.corpus.corpus import BadImage
from infra.corpus.embeddings import backbone_fingerprint
from infra.corpus.json_metadata import parse_number, read_json_fields
from infra.errors import UserError
from infra.storage import filesystem
from pretrain.data.images import decode_image

if TYPE_CHECKING:
    from PIL import Image

    from curation.context import Context

_BATCH = 256
Scores = np.ndarray
"""Float64 `[rows]`; NaN for images that have none"""


def scores(context: Context, config: ScorerConfig, rows: np.ndarray) -> Scores:
    """Scores of some rows of the corpus.

    Raises:
        UserError: the scorer's file is missing or does not fit.
    """
    found = _OF[config.kind](context, config, rows)
    found[~np.isfinite(found)] = np.nan
    return found


def _read_field(context: Context, config: FieldScorer, rows: np.ndarray) -> Scores:
    found = [parse_number(each) for each in read_json_fields(context.corpus, rows, config.field)]
    return np.array([np.nan if each is None else each for each in found])


def _read_table(context: Context, config: TableScorer, rows: np.ndarray) -> Scores:
    try:
        with filesystem.open_read(config.table) as file:
            table = pq.read_table(file, columns=["key", config.column])
        keys = table["key"].cast(pa.string())
        values = table[config.column].cast(pa.float64(), safe=False)
    except (pa.ArrowException, KeyError) as error:
        message = f"{config.table}: no parquet file with keys and numbers in columns key and {config.column}: {error}"
        raise UserError(message.splitlines()[0]) from None
    if pc.count_distinct(keys).as_py() < len(keys):
        raise UserError(f"{config.table}: has keys twice; leave one row of each")
    place = index_in(context.corpus.table["key"], keys)[rows]
    return np.where(place >= 0, values.to_numpy()[place], np.nan) if len(values) else np.full(len(rows), np.nan)


def _apply_head(context: Context, config: HeadScorer, rows: np.ndarray) -> Scores:
    head = Head(config)
    blocks = (context.vectors.take(rows[some]) for some in _batches(len(rows)))
    return np.concatenate([head(widen(block)) for block in blocks])


class Head:
    """A few linear layers on embeddings, as aesthetic and NSFW predictors are given out.

    Raises:
        UserError: the checkpoint holds no linear layers that follow one another.
    """

    def __init__(self, config: HeadScorer) -> None:
        from pretrain.backbones import weights

        self.config = config
        self.layers = _chain(weights.read_weights(config.checkpoint), config.checkpoint)
        if config.unit >= len(self.layers[-1][1]):
            raise UserError(f"unit: {config.unit}: {config.checkpoint} has {len(self.layers[-1][1])} outputs")

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


Layer = tuple[np.ndarray, np.ndarray]
"""Weight `[out, in]` and bias `[out]`, float64"""


def _chain(state: Any, path: str) -> list[Layer]:
    """Linear layers in order of the numbers in their names; in that of the file where they have none."""
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    shapes = {str(name): tuple(value.shape) for name, value in state.items() if hasattr(value, "shape")}
    names = [name.removesuffix("weight") for name in shapes if name.endswith("weight")]
    if all(re.search(r"\d", name) for name in names):
        names.sort(key=lambda name: [int(each) for each in re.findall(r"\d+", name)])
    elif path.endswith(".safetensors") and len(names) > 1:
        raise UserError(f"{path}: layers without numbers have no order in such a file; number them")
    known = {f"{name}{part}" for name in names for part in ("weight", "bias")}
    linear = all(len(shapes[f"{name}weight"]) == 2 for name in names)
    fitting = linear and all(shapes[f"{a}weight"][0] == shapes[f"{b}weight"][1] for a, b in pairwise(names))
    biased = linear and all(
        shapes.get(f"{name}bias") in (None, shapes[f"{name}weight"][:1]) for name in names
    )  # fmt: skip
    if not names or not fitting or not biased or set(shapes) - known or len(shapes) < len(state):
        raise UserError(f"{path}: not linear layers alone that follow one another; is it a head?")
    return [_layer(state, name) for name in names]


def _layer(state: Mapping[str, Any], name: str) -> Layer:
    """One without a bias has zeros."""
    weight, bias = state[f"{name}weight"].double().numpy(), state.get(f"{name}bias")
    return weight, np.zeros(len(weight)) if bias is None else bias.double().numpy()


def _score_captions(context: Context, config: CaptionScorer, rows: np.ndarray) -> Scores:
    from pretrain.backbones import image_text
    from pretrain.backbones.identity import backbone_identity

    embedded = context.inputs.embeddings
    assert embedded is not None
    if embedded.backbone != backbone_fingerprint(*backbone_identity(config.model)):
        raise UserError(f"score: {embedded.artifact.url}: not by {config.model.checkpoint}; embed with that model")
    text, column = image_text.load(config.model), context.corpus.table["caption"]
    found = np.full(len(rows), np.nan)
    for some in _batches(len(rows)):
        captions = take_chunked(column, rows[some]).to_pylist()
        there = np.flatnonzero([bool(each) for each in captions])
        if len(there):
            texts = text.texts([captions[place] for place in there])
            images = widen(context.vectors.take(rows[some][there]))
            found[np.arange(some.start, some.stop)[there]] = np.einsum("ij,ij->i", images, texts)
    return found


def _call_plugin(context: Context, config: PluginScorer, rows: np.ndarray) -> Scores:
    try:
        factory = pkgutil.resolve_name(config.name)
    except (ValueError, ImportError, AttributeError) as error:
        raise UserError(f"score: {config.name}: {error}; name something importable as package.module:name") from None
    score = factory(config.checkpoint) if callable(factory) else None
    if not callable(score):
        raise UserError(f"score: {config.name}: gives no function of images; see the plugin scorer's help")
    found = np.full(len(rows), np.nan)
    for some in _batches(len(rows)):
        images = [_image(context, row) for row in rows[some].tolist()]
        there = [place for place, image in enumerate(images) if image is not None]
        numbers = np.asarray(score([images[place] for place in there]), dtype=np.float64) if there else np.empty(0)
        if numbers.shape != (len(there),):
            raise UserError(f"score: {config.name}: {numbers.shape} numbers for {len(there)} images; give one each")
        found[some.start + np.array(there, dtype=np.int64)] = numbers
        context.report_progress(some.stop / len(rows))
    return found


def _image(context: Context, row: int) -> Image.Image | None:
    """None where it cannot be decoded."""
    image = decode_image(context.corpus, context.corpus.read_image(row))
    return None if isinstance(image, BadImage) else image


def _batches(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BATCH, count)) for start in range(0, count, _BATCH))


_OF: Mapping[str, Callable[[Context, Any, np.ndarray], Scores]] = {
    "field": _read_field,
    "table": _read_table,
    "head": _apply_head,
    "caption": _score_captions,
    "plugin": _call_plugin,
}
