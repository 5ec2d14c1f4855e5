"""Why an image was kept or dropped: its verdict, what it lost to, and what it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from eval.report.gallery import Picture, Shelf
from eval.report.selection_gallery import corpora_of
from eval.report.templating import render_template
from infra.artifacts.artifact import Artifact, find
from infra.corpus.selection import Selection
from infra.errors import UserError

_COMPARED = {
    "leak": "eval_embeddings_",
    "restored": "eval_embeddings_",
    "retrieved": "seed_embeddings",
    "not_retrieved": "seed_embeddings",
}
_MOST = 24  # companions shown


@dataclass(frozen=True)
class Step:
    """One verdict on the way from an image to what is kept in its place."""

    key: str
    text: str
    picture: Picture


@dataclass(frozen=True)
class Explanation:
    """All that a selection tells of one image."""

    key: str
    trail: list[Step]
    companions: list[Picture]
    count: int
    """Images that are the same to the selection, this one among them"""

    def text(self) -> str:
        """For the terminal."""
        lines = (f"{'  ' * depth}{step.key}: {step.text}" for depth, step in enumerate(self.trail))
        return "\n".join("".join(each if each.isprintable() else "\ufffd" for each in line) for line in lines)


def explain(url: str, key: str) -> Explanation:
    """Tell of one image of a selection's corpus.

    Raises:
        UserError: the corpus has no such key.
    """
    selection, shelf = Selection.open(url), Shelf()
    corpus = selection.artifact.manifest.inputs["corpus"].url
    trail: list[Step] = []
    row = _find_row(selection, key)
    if row is None:
        raise UserError(f"{key}: no image of {corpus} has this key; see the column key of its index.parquet")
    told = row
    while row is not None and row["key"] not in [step.key for step in trail]:
        mark = "kept" if row["keep"] else "dropped"
        trail.append(Step(row["key"], _describe_row(row), shelf.picture(corpus, row["key"], row["key"], mark)))
        role = _COMPARED.get(row["reason"])
        if row["matched_key"] is None:
            break
        if role is not None and (row["reason"] != "restored" or _find_row(selection, row["matched_key"]) is None):
            trail += _reference(selection.artifact, role, row["matched_key"], shelf)
            break
        row = _find_row(selection, row["matched_key"])
    same = selection.ledger.filter(pc.equal(selection.ledger["duplicate_group"], told["duplicate_group"]))
    pictures = [
        shelf.picture(corpus, each["key"], each["key"], "kept" if each["keep"] else "dropped")
        for each in same.slice(0, _MOST).to_pylist()
    ]
    return Explanation(key, trail, pictures if len(same) > 1 else [], len(same))


def _find_row(selection: Selection, key: str) -> dict[str, Any] | None:
    rows = selection.ledger.filter(pc.equal(selection.ledger["key"], key)).to_pylist()
    return rows[0] if rows else None


def _describe_row(row: dict[str, Any]) -> str:
    verdict = "kept" if row["keep"] else "dropped"
    by = f" by the step {row['step']}: {row['reason'].replace('_', ' ')}" if row["step"] else ""
    score = "" if math.isnan(row["score"]) else f"{row['score']:.4f} "
    against = f", {score}against {row['matched_key']}" if row["matched_key"] is not None else ""
    stands = f"; stands for {row['weight']:g} images" if row["keep"] and row["weight"] > 1 else ""
    return f"{verdict}{by}{against}{stands}"


def _reference(artifact: Artifact, role: str, key: str, shelf: Shelf) -> list[Step]:
    """The image of another corpus that one was compared with, by this selection or one it went on from."""
    names = [name for name in artifact.manifest.inputs if name.startswith(role)]
    holder = shelf.holder(corpora_of(artifact, *names), key)
    if holder is not None:
        return [Step(key, f"an image of {holder}", shelf.picture(holder, key, key, "reference"))]
    earlier = artifact.manifest.inputs.get("selection")
    before = None if earlier is None else find(earlier.url)
    return [] if before is None else _reference(before, role, key, shelf)


def write_page(story: Explanation, path: Path) -> None:
    """One self-contained HTML page; everything that came from data is escaped.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_text(render_template("explain", story=story), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give --page a file in a folder that can be written") from None
