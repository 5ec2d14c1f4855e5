"""Curation steps against brute force and against known truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import run
from curation.config import (
    CurateConfig,
    Decontaminate,
    EmbedConfig,
    Exact,
    MaterializeConfig,
    NearDuplicates,
    Retrieve,
)
from curation.curate import materialize
from curation.embed import embed
from curation.scoring import score_embedded, score_known_leaks
from curation.steps.decontaminate import decontaminate
from curation.steps.exact import exact
from curation.steps.near_duplicates import components, near_duplicates
from curation.steps.retrieve import retrieve
from curation.verdicts import Verdicts
from infra.corpora import Corpus
from infra.errors import UserError
from infra.selections import Selection
from pretrain.config import PixelDescriptor
from tests.conftest import Embedded, ingested

COPIES = PixelDescriptor(side=16, frequencies=8, whiten=1.5)
LIKENESS = PixelDescriptor(side=16, frequencies=16, whiten=1.0, signs=False)


def unit(seed: int, n: int, dim: int = 4) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def verdicts(n: int) -> Verdicts:
    return Verdicts.initial([f"k{i:03d}" for i in range(n)])


def brute_force_components(vectors: np.ndarray, threshold: float) -> list[set[int]]:
    """Connected components by repeated search, in pure Python."""
    similar = vectors @ vectors.T >= threshold
    left, found = set(range(len(vectors))), []
    while left:
        group, frontier = set(), {min(left)}
        while frontier:
            group |= frontier
            frontier = {j for i in frontier for j in np.flatnonzero(similar[i])} - group
        found.append(group)
        left -= group
    return found


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.3, 0.99))
def test_components_are_those_of_brute_force(seed: int, n: int, threshold: float) -> None:
    vectors = unit(seed, n)
    labels = components(vectors, threshold, neighbours=n)
    found = {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}
    assert found == {frozenset(int(i) for i in group) for group in brute_force_components(vectors, threshold)}


def test_of_each_component_the_largest_image_stays_and_stands_for_all() -> None:
    vectors, pixels = unit(1, 30), np.random.default_rng(2).integers(1, 9, 30)
    state = verdicts(30)
    near_duplicates(state, NearDuplicates(threshold=0.8, neighbours=30), vectors, pixels)
    for group in brute_force_components(vectors, 0.8):
        stays = [i for i in group if state.keep[i]]
        assert len(stays) == 1
        assert pixels[stays[0]] == max(pixels[list(group)])
        assert state.weight[stays[0]] == len(group)
        assert all(state.winner[i] == state.keys[stays[0]] for i in group if i != stays[0])


def test_the_verdicts_do_not_depend_on_the_order_of_the_corpus() -> None:
    vectors, pixels = unit(1, 40), np.full(40, 5)
    hashes = np.array([f"h{i % 30}" for i in range(40)], dtype=object)
    keys = [f"k{i:03d}" for i in range(40)]
    outcomes = []
    for order in (np.arange(40), np.random.default_rng(0).permutation(40)):
        state = Verdicts.initial([keys[i] for i in order])
        exact(state, hashes[order])
        near_duplicates(state, NearDuplicates(threshold=0.8, neighbours=40), vectors[order], pixels[order])
        retrieve(state, Retrieve(neighbours=2), vectors[order], unit(7, 5), np.array(list("abcde"), dtype=object))
        rows = zip(state.keys, state.keep, state.reason, state.winner, state.weight, strict=True)
        outcomes.append(sorted(tuple(map(str, row)) for row in rows))
    assert outcomes[0] == outcomes[1]


def test_exact_copies_go_and_the_first_key_stays() -> None:
    state = verdicts(5)
    exact(state, np.array(["x", "y", "x", "x", "z"], dtype=object))
    assert state.keep.tolist() == [True, True, False, False, True]
    assert state.winner[2] == state.winner[3] == "k000"
    assert state.weight.tolist() == [3, 1, 1, 1, 1]


def test_leaks_are_those_of_brute_force() -> None:
    vectors, evaluation = unit(3, 60), unit(4, 10)
    state = verdicts(60)
    decontaminate(state, Decontaminate(threshold=0.8), vectors, evaluation, np.arange(10).astype(object))
    best = (vectors @ evaluation.T).max(1)
    np.testing.assert_array_equal(state.keep, best < 0.8)
    np.testing.assert_allclose(state.score[~state.keep], best[~state.keep], rtol=1e-5)


def test_retrieval_keeps_the_neighbours_of_brute_force() -> None:
    vectors, seed = unit(5, 60), unit(6, 4)
    state = verdicts(60)
    retrieve(state, Retrieve(neighbours=5), vectors, seed, np.arange(4).astype(object))
    assert set(np.flatnonzero(state.keep)) == set(np.argsort(-(seed @ vectors.T), axis=1)[:, :5].ravel())


def embedded_urls(corpora: Embedded, backbone: PixelDescriptor, out: Path) -> dict[str, str]:
    return {
        role: embed(EmbedConfig(backbone=backbone, corpus=getattr(corpora, role), out=str(out / "{id}"))).url
        for role in ("pool", "seed", "test")
    }


def test_the_embedded_pool_is_cleaned(embedded: Embedded, tmp_path: Path) -> None:
    copies, likeness = embedded_urls(embedded, COPIES, tmp_path), embedded_urls(embedded, LIKENESS, tmp_path)
    clean = run(
        CurateConfig(
            steps=[Exact(), NearDuplicates(threshold=0.95), Decontaminate(threshold=0.88)],
            corpus=embedded.pool,
            embeddings=copies["pool"],
            evaluation=[copies["test"]],
            out=str(tmp_path / "clean"),
        )
    )
    near = run(
        CurateConfig(
            steps=[Retrieve(neighbours=8)],
            corpus=embedded.pool,
            embeddings=likeness["pool"],
            seed=likeness["seed"],
            selection=clean.url,
            out=str(tmp_path / "near"),
        )
    )
    scores = score_embedded(near.url, embedded.truth)
    assert scores["dedup"]["recall"] > 0.75
    assert scores["decontamination"]["precision"] > 0.9
    assert scores["decontamination"]["recall"] > 0.8
    junk = np.mean([each["kind"] != "photo" for each in json.loads(embedded.truth.read_text()).values()])
    assert scores["retrieval"]["precision"] > 1 - junk + 0.2

    ledger = Selection.open(near.url).ledger.to_pylist()
    assert all(row["reason"] for row in ledger)
    smaller = Corpus.open(
        materialize(MaterializeConfig(corpus=embedded.pool, selection=near.url, out=str(tmp_path / "small"))).url
    )
    pool = Corpus.open(embedded.pool)
    originals = {key: pool.read_image(row) for row, key in enumerate(pool.keys)}
    assert smaller.keys == [row["key"] for row in ledger if row["keep"]]
    assert all(smaller.read_image(row) == originals[key] for row, key in enumerate(smaller.keys))


def test_a_selection_over_another_corpus_is_refused(embedded: Embedded, tmp_path: Path) -> None:
    of_seed = run(CurateConfig(steps=[Exact()], corpus=embedded.seed, out=str(tmp_path / "seed")))
    with pytest.raises(UserError, match="judges another corpus"):
        run(CurateConfig(steps=[Exact()], corpus=embedded.pool, selection=of_seed.url, out=str(tmp_path / "x")))


def test_a_step_without_its_input_is_named(embedded: Embedded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="embeddings: needed by the step near_duplicates"):
        run(CurateConfig(corpus=embedded.pool, out=str(tmp_path / "x")))


@pytest.mark.slow
def test_known_leaks_of_cifar10_are_found(shared_data: Path, tmp_path: Path) -> None:
    """Test images listed as near-duplicates of training images of two shards, against those shards."""
    folder = shared_data / "cifar10"
    pool = ingested(folder / "train-{000000..000001}.tar.gz", tmp_path / "pool")
    test = ingested(folder / "test-*.tar.gz", tmp_path / "test")
    urls = [
        embed(EmbedConfig(backbone=COPIES, corpus=each.artifact.url, out=str(tmp_path / "{id}"))).url
        for each in (pool, test)
    ]
    selection = run(
        CurateConfig(
            steps=[Decontaminate(threshold=0.9)],
            corpus=pool.artifact.url,
            embeddings=urls[0],
            evaluation=[urls[1]],
            out=str(tmp_path / "selection"),
        )
    )
    scores = score_known_leaks(selection.url, folder / "near_duplicates_test_train.csv", "train_key")
    assert scores["listed"] > 20
    assert scores["recall"] > 0.6
    assert selection.metrics["kept"] > 0.9 * len(pool)
