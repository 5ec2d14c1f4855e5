"""What the pages of `fovea ui` tell, as values for their templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow.compute as pc

from eval.report.bars import backbone_name
from eval.report.templating import PAGE
from eval.stats.verdict import MODEL
from eval.ui.catalog import Catalog, describe_artifact, size_of
from eval.ui.lineage import HEIGHT, WIDTH, draw_lineage
from eval.ui.search import Hit, Searcher
from infra.artifacts.artifact import Artifact, find
from infra.corpus.corpus import SHARDS, Corpus
from infra.corpus.selection import Selection

_ROWS, _IMAGES = 200, 96  # of a page
_MOST_SHARDS = 500
_INTERNAL = ("features", "teacher_cache")  # stages whose artifacts only spare others work


def index(catalog: Catalog, asked: Mapping[str, str]) -> dict[str, Any]:
    """Runs with their scores, and all artifacts, those that were asked for."""
    everything = catalog.artifacts()
    found = [each for each in everything if _wanted(each, asked)]
    hidden = 0
    if not any(asked.get(name) for name in ("q", "kind", "all")):
        listed = [each for each in found if each.manifest.stage not in _INTERNAL]
        hidden, found = len(found) - len(listed), listed
    first = _number(asked.get("from"))
    return {
        "root": catalog.root,
        "runs": [_run(each, catalog) for each in everything if each.manifest.stage == "report"],
        "artifacts": [_row(each, catalog) for each in found[first : first + _ROWS]],
        "count": len(found),
        "hidden": hidden,
        "kinds": sorted({each.manifest.kind for each in everything}),
        "asked": dict(asked),
        "more": _more(asked, first + _ROWS, len(found)),
        "unreadable": catalog.unreadable(),
    }


def _wanted(artifact: Artifact, asked: Mapping[str, str]) -> bool:
    made = artifact.manifest
    text = " ".join([made.stage, made.kind, artifact.id, artifact.url, str(made.config)]).lower()
    return asked.get("kind", "") in ("", made.kind) and all(word in text for word in asked.get("q", "").lower().split())


def _run(report: Artifact, catalog: Catalog) -> dict[str, Any]:
    """A run by its report: a row for each backbone that it evaluated, beside its baselines."""
    scored: dict[str, dict[str, Score]] = {}
    for name, source in report.manifest.inputs.items():
        artifact = catalog.get(source.id) if name.startswith("evaluate-") else None
        if artifact is not None:
            scored[backbone_name(name)] = _scores(catalog.headlines(artifact))
    protocols = list(dict.fromkeys(protocol for told in scored.values() for protocol in told))
    return {
        "id": report.id,
        "title": report.manifest.config.get("title", "run"),
        "created": _time(report),
        "place": _place(report, catalog),
        "protocols": protocols,
        "scored": scored,
    }


@dataclass(frozen=True)
class Score:
    """A backbone's headline by one protocol, and those of its baselines, as they are shown."""

    value: float
    shown: str
    baselines: str


def _scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for protocol in dict.fromkeys(row["protocol"] for row in rows):
        by_model = {row["model"]: row for row in rows if row["protocol"] == protocol}
        model = by_model.pop(MODEL, None)
        if model is not None:
            baselines = ", ".join(f"{name} {_shown(row)}" for name, row in by_model.items())
            found[protocol] = Score(model["value"], _shown(model), baselines)
    return found


def _shown(row: Mapping[str, Any]) -> str:
    return f"{100 * row['value']:.1f} %" if row["is_fraction"] else f"{row['value']:.4g}"


def _row(artifact: Artifact, catalog: Catalog) -> dict[str, Any]:
    made = artifact.manifest
    place, words_ = _place(artifact, catalog), describe_artifact(artifact)
    facts = {"id": artifact.id, "stage": made.stage, "kind": made.kind, "created": _time(artifact), "place": place}
    return facts | {"words": words_, "bytes": format_count(size_of(artifact)), "has_page": has_page(artifact)}


def artifact(catalog: Catalog, artifact: Artifact) -> dict[str, Any]:
    """One artifact: its numbers, its settings, its files, and the drawing of its lineage."""
    made = artifact.manifest
    pictures = [file.path for file in made.files if file.path.endswith(".png")]
    return {
        "each": _row(artifact, catalog),
        "url": artifact.url,
        "numbers": list(flatten(made.metrics).items()),
        "config": made.config,
        "files": [{"path": file.path, "bytes": format_count(file.bytes), "sha256": file.sha256} for file in made.files],
        "pictures": pictures,
        "shards": _shards(artifact),
        "inputs": dict(made.inputs),
        "known": {each.id for each in catalog.artifacts()},
        "lineage": draw_lineage(artifact, catalog),
        "box": {"width": WIDTH, "height": HEIGHT},
        "card": artifact.read_bytes("README.md").decode() if made.kind == "backbone" else None,
        "searchable": made.stage == "embed",
        "has_images": made.kind in ("corpus", "selection"),
    }


def _shards(artifact: Artifact) -> list[dict[str, Any]]:
    if artifact.manifest.kind != "corpus":
        return []
    told = artifact.read_json(SHARDS)[:_MOST_SHARDS]
    return [{**each, "bytes": format_count(each["bytes"])} for each in told]


def comparison(catalog: Catalog, chosen: Sequence[Artifact]) -> dict[str, Any]:
    """Artifacts side by side: numbers of all, and the settings in which they differ."""
    numbers = [_numbers(each, catalog) for each in chosen]
    settings = [_settings(each, catalog) for each in chosen]
    inputs = [{role: source.id[:12] for role, source in each.manifest.inputs.items()} for each in chosen]
    return {
        "chosen": [_row(each, catalog) for each in chosen],
        "numbers": _side_by_side(numbers),
        "settings": [row for row in _side_by_side(settings) if row["differ"]],
        "inputs": [row for row in _side_by_side(inputs) if row["differ"]],
    }


def _numbers(artifact: Artifact, catalog: Catalog) -> dict[str, Any]:
    """Of a run the scores of all its backbones."""
    if artifact.manifest.stage != "report":
        return flatten(artifact.metrics)
    scored = _run(artifact, catalog)["scored"]
    return flatten({name: {protocol: each.value for protocol, each in told.items()} for name, told in scored.items()})


def _settings(artifact: Artifact, catalog: Catalog) -> dict[str, Any]:
    """Of a run those of all its stages."""
    own = artifact.manifest
    if own.stage != "report":
        return flatten(own.config)
    stages = {role: catalog.get(source.id) for role, source in own.inputs.items()}
    return flatten({role: each.manifest.config for role, each in stages.items() if each is not None})


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = []
    for name in names:
        cells = [column.get(name) for column in columns]
        rows.append({"name": name, "cells": cells, "differ": any(cell != cells[0] for cell in cells)})
    return rows


def images(artifact: Artifact, corpus_of: Callable[[str], Corpus], asked: Mapping[str, str]) -> dict[str, Any]:
    """Some images of a corpus, or of a selection with what was decided about them."""
    selection = Selection.open(artifact.url) if artifact.manifest.kind == "selection" else None
    corpus = corpus_of(artifact.id if selection is None else artifact.manifest.inputs["corpus"].id)
    rows = np.arange(len(corpus))
    if asked.get("key"):
        rows = rows[pc.match_substring(corpus.table["key"], asked["key"]).to_numpy()]
    reasons: list[str] = []
    if selection is not None:
        reasons = sorted(each for each in pc.unique(selection.ledger["reason"]).to_pylist() if each)
        if reason := asked.get("reason"):
            rows = rows[pc.fill_null(pc.equal(selection.ledger["reason"], reason), False).to_numpy()[rows]]
    first = _number(asked.get("from"))
    some = rows[first : first + _IMAGES]
    entries = corpus.table.take(some).select(["key", "caption", "width", "height"]).to_pylist()
    verdicts = selection.ledger.take(some).to_pylist() if selection is not None else [{} for _ in some]
    return {
        "artifact": artifact,
        "corpus": corpus.artifact.id,
        "images": [{"row": int(row), **entry, **v} for row, entry, v in zip(some, entries, verdicts, strict=True)],
        "count": len(rows),
        "reasons": reasons,
        "asked": dict(asked),
        "more": _more(asked, first + _IMAGES, len(rows)),
        "judged": selection is not None,
    }


def search(
    searchable: Sequence[Artifact],
    chosen: Artifact,
    searcher: Searcher,
    asked: Mapping[str, str],
    hits: list[Hit] | None,
) -> dict[str, Any]:
    """The search form and what was found."""
    return {
        "searchable": [{"id": each.id, "words": _embedded(each)} for each in searchable],
        "chosen": chosen.id,
        "corpus": searcher.corpus.artifact.id,
        "has_texts": searcher.has_texts,
        "asked": dict(asked),
        "hits": hits,
    }


def _embedded(embeddings: Artifact) -> str:
    """Which images were embedded, and by what."""
    config, corpus = embeddings.manifest.config, find(embeddings.manifest.inputs["corpus"].url)
    source = None if corpus is None else corpus.manifest.inputs.get("source", corpus.manifest.inputs.get("corpus"))
    name = "a corpus" if source is None else source.url.rstrip("/").rpartition("/")[2]
    model = " ".join(str(config[key]) for key in ("kind", "model") if key in config)
    return f"{embeddings.metrics['images']:,} images of {name} by {model} ({embeddings.id[:6]})"


def has_page(artifact: Artifact) -> bool:
    """Whether an artifact holds a page of its own."""
    return any(file.path == PAGE for file in artifact.manifest.files)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; long lists are left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        elif not isinstance(value, list) or len(str(value)) < 200:
            found[f"{prefix}{name}"] = value
    return found


def format_count(count: int) -> str:
    """Bytes in a unit that fits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _place(artifact: Artifact, catalog: Catalog) -> str:
    return artifact.url.removeprefix(catalog.root.rstrip("/")).lstrip("/") or "."


def _time(artifact: Artifact) -> str:
    return artifact.manifest.created[:16].replace("T", " ")


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else 0


def _more(asked: Mapping[str, str], start: int, count: int) -> str | None:
    """The query of the next part, if there is more."""
    return urlencode({**asked, "from": start}) if start < count else None
