"""Galleries of a selection: what curation joined, dropped and kept, and what it was least sure of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eval.report.gallery import Gallery, Picture, Shelf
from infra.artifacts.artifact import Artifact, find
from infra.corpus.selection import Selection, evidence_name

_GROUP = 5  # pictures of a group


@dataclass
class SelectionGallery:
    """The galleries of one selection.

    Args:
        count: groups of a gallery.
    """

    artifact: Artifact
    count: int

    def __post_init__(self) -> None:
        self.ledger = Selection.open(self.artifact.url).ledger
        self.corpus = self.artifact.manifest.inputs["corpus"].url
        self.shelf = Shelf()

    def galleries(self) -> list[Gallery]:
        """Of each step those that it has something to show for."""
        found: dict[str, Gallery] = {}
        for number, step in enumerate(self.artifact.metrics["steps"]):
            if step["step"] in _GALLERIES:  # of two steps of one kind the last: the ledger does not tell them apart
                found |= {gallery.title: gallery for gallery in _GALLERIES[step["step"]](self, number, step)}
        return [gallery for gallery in found.values() if gallery.groups]

    def near_duplicates(self, number: int, step: dict[str, Any]) -> list[Gallery]:
        """What was joined, and where the join was least sure."""
        return [
            self._duplicates("Near-duplicates", "near_duplicate"),
            self._worst(step),
            self._borderline_pairs(number),
        ]

    def perceptual(self, number: int, step: dict[str, Any]) -> list[Gallery]:
        """What looked the same."""
        return [self._duplicates("Perceptual duplicates", "perceptual_duplicate")]

    def semdedup(self, number: int, step: dict[str, Any]) -> list[Gallery]:
        """What meant the same."""
        return [self._duplicates("Same meaning", "semantic_duplicate")]

    def _duplicates(self, title: str, reason: str) -> Gallery:
        """Groups from the most to the least certain, each with the image that they lost to in front."""
        rows = self._because(reason)
        winners = rows["matched_key"].combine_chunks().dictionary_encode()
        codes, scores = winners.indices.to_numpy(), rows["score"].to_numpy()
        least = np.full(len(winners.dictionary), np.inf)
        np.minimum.at(least, codes, scores)
        groups = [
            self._group(winners.dictionary[int(code)].as_py(), rows.take(np.flatnonzero(codes == code)))
            for code in _spread(np.argsort(-least, kind="stable"), self.count)
        ]
        note = f"{len(least)} groups, from the most to the least alike; numbers are similarities to the first of each."
        return Gallery(title, note, groups)

    def _group(self, winner: str, losers: pa.Table) -> list[Picture]:
        rows = losers.sort_by([("score", "descending")]).slice(0, _GROUP - 1).to_pylist()
        (first,) = self.ledger.filter(pc.equal(self.ledger["key"], winner)).to_pylist()
        shown = self._mine(winner, "stays", "kept") if first["keep"] else self._mine(winner, "", "dropped")
        return [shown, *(self._dropped(row) for row in rows)]

    def _worst(self, step: dict[str, Any]) -> Gallery:
        """The components whose members are least like what stands for them."""
        groups = []
        for each in step["worst"][: self.count]:
            (row,) = self.ledger.filter(pc.equal(self.ledger["key"], each["key"])).to_pylist()
            if row["matched_key"] is not None:
                size = f"of {each['images']}"
                groups.append([self._mine(row["matched_key"], size, "kept"), self._dropped(row)])
        return Gallery("Worst components", "Each with its member least like the image that stays.", groups)

    def _borderline_pairs(self, number: int) -> Gallery:
        """The pairs just above the threshold, without which components would fall apart."""
        pairs = self._evidence(number, "pairs")
        groups = [
            [self._row(pair["row"], f"{pair['similarity']:.3f}"), self._row(pair["other"], "")]
            for pair in pairs.sort_by([("similarity", "ascending")]).slice(0, self.count).to_pylist()
        ]
        return Gallery("Borderline pairs", "The least similar pairs that were joined.", groups)

    def leaks(self, number: int, step: dict[str, Any]) -> list[Gallery]:
        """Of each evaluation set leaks from the most to the least certain, and both sides of the threshold."""
        threshold = self.artifact.manifest.config["steps"][number]["threshold"]
        found: list[Gallery] = []
        for name, facts in step["sets"].items():
            near = self._evidence(number, name)
            similar = near["similarity"].to_numpy()
            order = np.argsort(-similar, kind="stable")
            certain = _spread(order[similar[order] >= threshold], self.count)
            doubtful = np.argsort(np.abs(similar - threshold), kind="stable")[: self.count]
            note = f"{facts['leaks']} pool images too much like an evaluation image, from the most to the least alike."
            shown = facts.get("name", name)
            found.append(Gallery(f"Leaks from {shown}", note, self._hits(name, near.take(certain), threshold)))
            note = f"Pairs on both sides of {threshold:g}."
            found.append(Gallery(f"Borderline leaks, {shown}", note, self._hits(name, near.take(doubtful), threshold)))
        return found

    def _hits(self, name: str, near: pa.Table, threshold: float) -> list[list[Picture]]:
        """Pool images behind the evaluation image they are like."""
        test = next(iter(corpora_of(self.artifact, name)), None)
        groups = []
        for hit in near.to_pylist():
            mark = "dropped" if hit["similarity"] >= threshold else "kept"
            shown = [self._row(hit["row"], f"{hit['similarity']:.3f}", mark)]
            if test is not None:
                shown.insert(0, self.shelf.picture_of_row(test, hit["evaluation_row"], "test", "reference"))
            groups.append(shown)
        return groups

    def retrieved(self, number: int, step: dict[str, Any]) -> list[Gallery]:
        """What the seed brought in, and what it left."""
        near, far = (self._because(reason) for reason in ("retrieved", "not_retrieved"))
        kept, lost = (
            rows.take(_spread(np.argsort(-rows["score"].to_numpy(), kind="stable"), self.count)).to_pylist()
            for rows in (near, far)
        )
        seed = corpora_of(self.artifact, "seed_embeddings")
        return [
            Gallery(
                "Retrieved",
                f"{len(near)} pool images near the seed, each behind the seed image that brought it in.",
                list(self._beside(kept, seed, "seed", "kept")),
            ),
            Gallery(
                "Not retrieved",
                f"{len(far)} pool images that no seed image has among its nearest, behind the one most like them.",
                list(self._beside(lost, seed, "seed", "dropped")),
            ),
        ]

    def by_clusters(self, number: int, step: dict[str, Any]) -> list[Gallery]:
        """Clusters that many seed images fall into, and some that none does."""
        members, seeds = (self._evidence(number, name) for name in ("members", "seeds"))
        counts = np.bincount(seeds["cluster"].to_numpy(), minlength=step["clusters"])
        order = np.argsort(-counts, kind="stable")
        asked = order[: self.count][counts[order[: self.count]] > 0]
        there = np.unique(members["cluster"].to_numpy())
        unasked = _spread(there[counts[there] == 0], self.count)
        note = "Seed images, the pool images nearest to the centroid, and the first image beyond them."
        groups, others = ([self._cluster(int(each), members, seeds) for each in some] for some in (asked, unasked))
        return [
            Gallery("Clusters of the seed", note, groups),
            Gallery("Clusters without seed images", "The pool images nearest to the centroid.", others),
        ]

    def _cluster(self, cluster: int, members: pa.Table, seeds: pa.Table) -> list[Picture]:
        asked = seeds.filter(pc.equal(seeds["cluster"], int(cluster)))["row"].to_pylist()
        near = members.filter(pc.equal(members["cluster"], int(cluster))).sort_by([("similarity", "descending")])
        keep = self.ledger["keep"].take(near["row"])
        shown = [
            self.shelf.picture_of_row(url, row, "seed", "reference")
            for url in corpora_of(self.artifact, "seed_embeddings")
            for row in asked[:2]
        ]
        for kept, mark in ((True, "kept"), (False, "dropped")):
            rows = near.filter(pc.equal(keep, kept)).slice(0, _GROUP // 2).to_pylist()
            shown += [self._row(row["row"], f"{row['similarity']:.3f}", mark) for row in rows]
        return shown

    def scored(self, number: int, step: dict[str, Any]) -> list[Gallery]:
        """What lies on both sides of the bounds, from the lowest score to the highest."""
        table = self._evidence(number, "scores")
        settings, scores = self.artifact.manifest.config["steps"][number], table["score"].to_numpy()
        low, high = step["least"], settings["max"]
        gaps = [np.abs(scores - bound) for bound in (low, high) if bound is not None]
        nearest = np.argsort(np.min(gaps, axis=0), kind="stable")[: self.count]  # NaN comes last
        nearest = nearest[~np.isnan(scores[nearest])]
        rows = table.take(np.sort(nearest)).sort_by("score").to_pylist()
        kept = [(low is None or row["score"] >= low) and (high is None or row["score"] <= high) for row in rows]
        groups = [
            [self._row(row["row"], f"{row['score']:.3f}", "kept" if stays else "dropped")]
            for row, stays in zip(rows, kept, strict=True)
        ]
        return [Gallery(f"Borderline by {settings['name']}", "The images nearest to the bounds.", groups)]

    def _beside(
        self, rows: Sequence[dict[str, Any]], urls: list[str], caption: str, mark: str
    ) -> Iterator[list[Picture]]:
        """Images behind what they were compared with, where that is known."""
        for row in rows:
            shown = [self._mine(row["key"], f"{row['score']:.3f}", mark)]
            holder = self.shelf.holder(urls, row["matched_key"]) if row["matched_key"] is not None else None
            if holder is not None:
                shown.insert(0, self.shelf.picture(holder, row["matched_key"], caption, "reference"))
            yield shown

    def _evidence(self, number: int, name: str) -> pa.Table:
        return pq.read_table(self.artifact.local_file(evidence_name(number, f"{name}.parquet")))

    def _because(self, reason: str) -> pa.Table:
        return self.ledger.filter(pc.equal(self.ledger["reason"], reason))

    def _mine(self, key: str, caption: str, mark: str) -> Picture:
        return self.shelf.picture(self.corpus, key, caption, mark)

    def _row(self, row: int, caption: str, mark: str = "") -> Picture:
        return self.shelf.picture_of_row(self.corpus, row, caption, mark)

    def _dropped(self, row: dict[str, Any]) -> Picture:
        return self._mine(row["key"], f"{row['score']:.3f}", "dropped")


_GALLERIES = {
    "perceptual": SelectionGallery.perceptual,
    "near_duplicates": SelectionGallery.near_duplicates,
    "semdedup": SelectionGallery.semdedup,
    "decontaminate": SelectionGallery.leaks,
    "retrieve": SelectionGallery.retrieved,
    "retrieve_clusters": SelectionGallery.by_clusters,
    "score": SelectionGallery.scored,
}


def corpora_of(artifact: Artifact, *roles: str) -> list[str]:
    """URLs of the corpora whose embeddings a selection read in some roles, where they still are."""
    urls = []
    for role in roles:
        each = artifact.manifest.inputs.get(role)
        embedded = None if each is None else find(each.url)
        if embedded is not None:
            urls.append(embedded.manifest.inputs["corpus"].url)
    return urls


def _spread(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` items, evenly spread over their order."""
    return items[np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))]
