"""Curation that goes on from an earlier state of a corpus: the verdicts are those of a full run."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curation import run
from curation.config import CurateConfig, EmbedConfig
from curation.embed import embed
from curation.incremental import PreviousSelection
from curation.similarity.selfjoin import SelfJoin
from infra.corpus.selection import Selection
from infra.errors import UserError
from pretrain.backbones import features
from tests.conftest import image_folder, ingest_folder
from tests.pools import Pool, halved, planted, pool, unit

NONE = np.empty(0, dtype=np.int64)
STEPS = [
    {"kind": "exact"},
    {
        "kind": "near_duplicates",
        "threshold": 0.75,
        "representative": "first_key",
        "num_cells": 12,
        "allow_chains": True,
    },
    {"kind": "decontaminate", "threshold": 0.7, "drop": "components", "num_cells": 12},
]


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


class State:
    """A corpus that changes: images by key, each with its vector and bytes."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng, self.folder, self.number = np.random.default_rng(seed), folder, 0
        vectors = planted(seed, 900, 12)
        self.images = {f"k{i:04d}": (vector, digest(i % 850)) for i, vector in enumerate(vectors[:600])}
        self.later = {f"k{i:04d}": (vector, digest(i % 850)) for i, vector in enumerate(vectors)}
        self.tests = pool(folder, halved(vectors[::45].astype(float) + 0.1 * unit(seed, 20, 12)), "test")

    def grow(self, count: int) -> None:
        new = [key for key in self.later if key not in self.images][:count]
        self.images |= {key: self.later[key] for key in new}

    def lose(self, count: int) -> None:
        for key in self.rng.choice(list(self.images), count, replace=False):
            del self.images[str(key)]

    def change(self, count: int) -> None:
        for number, key in enumerate(self.rng.choice(list(self.images), count, replace=False)):
            self.images[str(key)] = (unit(self.number * 100 + number, 1, 12)[0], digest(10_000 * self.number + number))

    def write(self) -> Pool:
        """In another order each time."""
        self.number += 1
        keys = self.rng.permutation(list(self.images)).tolist()
        vectors = np.stack([self.images[key][0] for key in keys])
        rows = [{"sha256": self.images[key][1]} for key in keys]
        return pool(self.folder, vectors, f"state{self.number}", rows, keys)

    def curated(self, of: Pool, out: str, previous: str | None = None) -> Selection:
        config = CurateConfig(
            corpus=of.corpus,
            embeddings=of.embeddings,
            eval_embeddings=[str(self.tests.embeddings)],
            steps=STEPS,
            previous=previous,
            out=str(self.folder / out),
        )
        return Selection.open(run(config).url)


def verdicts(selection: Selection) -> list[dict[str, Any]]:
    return selection.ledger.sort_by("key").to_pylist()


@pytest.mark.parametrize("seed", range(3))
def test_going_on_ends_as_a_full_run_over_the_same_cells(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images come, go and change their bytes, shards are written in another order; four states one after another."""
    state = State(seed, tmp_path)
    last = state.curated(state.write(), "s0").artifact.url
    for number, change in enumerate((state.grow, state.lose, state.change, state.grow), 1):
        change(60)
        corpus = state.write()
        went_on = state.curated(corpus, f"s{number}", last)
        with monkeypatch.context() as patch:
            patch.setattr(PreviousSelection, "read_seen", lambda self, step, rows: np.zeros(len(rows), dtype=bool))
            patch.setattr(
                PreviousSelection,
                "read_forest",
                lambda self, step, names: ((NONE, NONE, np.empty(0, np.float32)), NONE),
            )
            full = state.curated(corpus, f"full{number}", last)
        np.testing.assert_equal(verdicts(went_on), verdicts(full))
        for mine, theirs in zip(went_on.artifact.metrics["steps"], full.artifact.metrics["steps"], strict=True):
            assert mine["kept"] == theirs["kept"]
            assert mine.get("sets") == theirs.get("sets")
            assert mine.get("curve") == theirs.get("curve")
        last = went_on.artifact.url


def test_going_on_in_one_cell_ends_as_if_there_had_been_nothing_before(tmp_path: Path) -> None:
    state = State(7, tmp_path)
    step = {"kind": "near_duplicates", "threshold": 0.75, "representative": "first_key", "allow_chains": True}
    config: dict[str, Any] = {"steps": [step]}

    def curate(of: Pool, out: str, previous: str | None = None) -> Selection:
        places = {"corpus": of.corpus, "embeddings": of.embeddings, "out": str(tmp_path / out)}
        return Selection.open(run(CurateConfig(**places, **config, previous=previous)).url)

    first = curate(state.write(), "a")
    state.grow(50)
    state.lose(50)
    corpus = state.write()
    second, alone = curate(corpus, "b", first.artifact.url), curate(corpus, "c")
    np.testing.assert_equal(verdicts(second), verdicts(alone))
    assert second.artifact.id != alone.artifact.id


def test_only_cells_that_new_images_visit_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(1, tmp_path)
    first = state.curated(state.write(), "a").artifact.url
    state.grow(2)
    compared = []
    above = SelfJoin._cell

    def cell(self: SelfJoin, partition: Any, number: int) -> Any:
        compared.append(len(partition.fresh_members(number)))
        return above(self, partition, number)

    monkeypatch.setattr(SelfJoin, "_cell", cell)
    state.curated(state.write(), "b", first)
    assert sum(count > 0 for count in compared) < len(compared) / 2
    assert sum(compared) <= 2 * 2 * 8


def test_other_steps_or_another_backbone_cannot_go_on(tmp_path: Path) -> None:
    state = State(2, tmp_path)
    corpus = state.write()
    first = state.curated(corpus, "a").artifact.url
    config = CurateConfig(corpus=corpus.corpus, steps=[{"kind": "exact"}], previous=first, out=str(tmp_path / "b"))
    with pytest.raises(UserError, match="made by other steps"):
        run(config)


def test_what_was_replaced_or_made_otherwise_is_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(3, tmp_path)
    before = state.write()
    first = state.curated(before, "a").artifact.url
    state.grow(30)
    corpus = state.write()
    done = state.curated(corpus, "b", first)
    monkeypatch.setattr("curation.curate.VERSION", 99)
    with pytest.raises(UserError, match="made by another version"):
        state.curated(corpus, "c", first)
    monkeypatch.undo()
    shutil.rmtree(before.corpus)
    assert state.curated(corpus, "b", first).artifact == done.artifact  # what is done needs nothing
    Path(corpus.corpus).rename(before.corpus)
    with pytest.raises(UserError, match="holds another corpus than the one used before"):
        state.curated(Pool(before.corpus, corpus.embeddings, corpus.keys), "c", first)


def test_vectors_that_came_out_otherwise_are_compared_anew(tmp_path: Path) -> None:
    vectors = planted(5, 500, 12)
    steps: dict[str, Any] = {"steps": [{"kind": "near_duplicates", "threshold": 0.8, "allow_chains": True}]}
    changed = vectors.copy()
    changed[:250] = np.nextafter(changed[:250], np.float16(2))
    states = [pool(tmp_path, vectors, "one"), pool(tmp_path, changed, "two", keys=[f"one{i:04d}" for i in range(500)])]
    places = [{"corpus": each.corpus, "embeddings": each.embeddings} for each in states]
    first = run(CurateConfig(**places[0], **steps, out=str(tmp_path / "a")))
    second, alone = (
        Selection.open(run(CurateConfig(**places[1], **steps, previous=url, out=str(tmp_path / name))).url)
        for url, name in ((first.url, "b"), (None, "c"))
    )
    np.testing.assert_equal(verdicts(second), verdicts(alone))


def test_cells_that_are_far_too_few_are_learned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.similarity.cells.SINGLE_CELL_ROWS", 100)
    vectors, steps = (
        planted(5, 2000, 12),
        {"steps": [{"kind": "near_duplicates", "threshold": 0.8, "allow_chains": True}]},
    )
    places = [{"corpus": each.corpus, "embeddings": each.embeddings} for each in (
        pool(tmp_path, vectors[:90]), pool(tmp_path, vectors, "all", keys=[f"k{i:04d}" for i in range(2000)]),
    )]  # fmt: skip
    first = run(CurateConfig.model_validate({**places[0], **steps, "out": str(tmp_path / "a")}))
    second = run(CurateConfig.model_validate({**places[1], **steps, "previous": first.url, "out": str(tmp_path / "b")}))
    alone = run(CurateConfig.model_validate({**places[1], **steps, "out": str(tmp_path / "c")}))
    assert [each.metrics["steps"][0]["cells"] for each in (first, second, alone)] == [1, 103, 103]
    np.testing.assert_equal(verdicts(Selection.open(second.url)), verdicts(Selection.open(alone.url)))


def test_images_that_are_the_same_are_not_embedded_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image_folder(tmp_path / "images", 30)
    first = embed(EmbedConfig(corpus=ingest_folder(source, tmp_path / "a").artifact.url, out=str(tmp_path / "va"))).url
    image_folder(source, 10, first=30)
    (source / "0003.png").write_bytes((source / "0031.png").read_bytes())
    (source / "0004.png").unlink()
    corpus = ingest_folder(source, tmp_path / "b").artifact.url
    alone = embed(EmbedConfig(corpus=corpus, out=str(tmp_path / "alone")))
    read = []
    images = features._Images

    def counted(of: Any, backbone: Any, rows: Any) -> Any:
        read.extend(rows)
        return images(of, backbone, rows)

    monkeypatch.setattr(features, "_Images", counted)
    config = EmbedConfig(corpus=corpus, previous=first, out=str(tmp_path / "vb"))
    second = embed(config)
    assert len(read) == 11
    assert second.id == alone.id
    assert [file.sha256 for file in second.manifest.files] == [file.sha256 for file in alone.manifest.files]
    other = config.model_copy(update={"backbone": config.backbone.model_copy(update={"side": 8}), "out": "x"})
    with pytest.raises(UserError, match="of another backbone"):
        embed(other)
