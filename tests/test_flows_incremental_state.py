"""A pool that grows: what a curation goes on from, and how much of what is kept has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import curation
from curation.config import CurateConfig, EmbedConfig
from curation.embed import embed
from flows import incremental_state
from flows.config import PipelineConfig
from flows.incremental_state import IncrementalState, changed_fraction, record_training
from tests.conftest import image_folder, ingest_folder


def test_a_curation_goes_on_from_the_last_one_that_is_whole(tmp_path: Path) -> None:
    root = tmp_path / "run"
    source = {"pool": "p", "test": "t", "train": "t"}
    config = PipelineConfig(root=str(root), sources=source, incremental=True)

    def curated(images: int) -> tuple[str, dict[str, str]]:
        folder = image_folder(tmp_path / "images", images)
        corpus = ingest_folder(folder, root / f"corpus-{images}").artifact.url
        before = IncrementalState.previous_of(config, corpus)
        vectors = embed(
            EmbedConfig(
                corpus=corpus, out=f"{root}/embed/{{id}}", previous=before.previous_selection("embed-pool-dedup")
            )
        )
        settings = {"corpus": corpus, "embeddings": vectors.url, "previous": before.previous_selection("deduplicate")}
        selection = curation.run(CurateConfig(**settings, out=f"{root}/deduplicate/{{id}}"))
        made = {"embed-pool-dedup": vectors.url, "deduplicate": selection.url, "other": "x"}
        before.remember(made)
        return corpus, {name: made[name] for name in ("embed-pool-dedup", "deduplicate")}

    first, made = curated(6)
    assert IncrementalState.previous_of(config, first).previous == {}  # the same again is the same, not one after it
    second, more = curated(8)
    assert IncrementalState.previous_of(config, second).previous == made
    third = ingest_folder(image_folder(tmp_path / "images", 9), root / "corpus-9").artifact.url
    assert IncrementalState.previous_of(config, third).previous == more
    other = config.model_copy(update={"dedup_embedding": config.dedup_embedding.model_copy(update={"batch": 7})})
    assert IncrementalState.previous_of(other, third).previous == {}  # by other settings
    assert IncrementalState.previous_of(config.model_copy(update={"incremental": False}), third).previous == {}
    shutil.rmtree(more["embed-pool-dedup"])
    assert IncrementalState.previous_of(config, third).previous == {}  # of half of it nothing can go on


def test_nothing_trained_on_is_all_changed(tmp_path: Path) -> None:
    corpus = ingest_folder(image_folder(tmp_path / "images", 5), tmp_path / "corpus")
    steps = [{"kind": "exact"}]
    selection = curation.run(CurateConfig(corpus=corpus.artifact.url, steps=steps, out=str(tmp_path / "a")))
    assert changed_fraction(str(tmp_path), selection.url) == 1
    record_training(str(tmp_path), selection.url)
    assert changed_fraction(str(tmp_path), selection.url) == 0
    shutil.rmtree(selection.url)
    again = curation.run(CurateConfig(corpus=corpus.artifact.url, steps=steps, out=str(tmp_path / "b")))
    assert changed_fraction(str(tmp_path), again.url) == 1  # what was trained on can no longer be told


keys = st.sets(st.integers(0, 12))


@given(keys, keys)
def test_the_share_is_that_of_the_sets(old: set[int], new: set[int]) -> None:
    def column(some: set[int]) -> pa.ChunkedArray:
        order = np.random.default_rng(0).permutation(sorted(some)) if some else []
        return pa.chunked_array([pa.array([f"{key:04d}" for key in order], pa.string())])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(incremental_state, "_read_trained_selection", lambda root: "old")
        patch.setattr(incremental_state, "_read_kept_keys", lambda url: column({"old": old, "new": new}[url]))
        found = changed_fraction("root", "new")
    assert found == (len(old ^ new) / len(old | new) if old | new else 0)
