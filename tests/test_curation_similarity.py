"""Joins, clusters and neighbors against brute force; and that nothing depends on how they are computed."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans

from curation.similarity import kmeans, kmeans_plus_plus
from curation.similarity.audit import audit
from curation.similarity.cells import Cells
from curation.similarity.exact import dots, round_to_float16, rounding_error, widen
from curation.similarity.forest import Forest, _sort_descending
from curation.similarity.kmeans import Centroids, assign_nearest, train
from curation.similarity.nearest import argmax_above, k_nearest, rank_candidates
from curation.similarity.selfjoin import SelfJoin
from curation.similarity.tiles import CpuTiles, TorchTiles, WorkerPool
from infra.compute.sharded_array import ShardedArray
from infra.compute.vector_search import IvfPqIndex
from infra.corpus.arrow import take_chunked
from tests.pools import curated, halved, planted, pool, unit

ROOT = Path(__file__).parents[1]
ONE = WorkerPool(CpuTiles(), 1)
WAYS = [ONE, WorkerPool(CpuTiles(), 3), WorkerPool(TorchTiles("cpu"), 1)]


def similarities(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return wide @ wide.T


def labels_of(similar: np.ndarray) -> np.ndarray:
    return connected_components(coo_array(similar), directed=False)[1]


def same_groups(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a, b]), axis=1)
    return pairs.shape[1] == len(np.unique(a)) == len(np.unique(b))


@given(st.lists(st.floats(-1, 1, width=16), min_size=3, max_size=300))
def test_float16_widens_exactly(values: list[float]) -> None:
    array = np.array([values], dtype=np.float16)
    np.testing.assert_array_equal(widen(array), array.astype(np.float32))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([2, 64, 1024]))
def test_inner_products_are_exact_and_float32_is_within_the_slack(seed: int, dim: int) -> None:
    a, b = unit(seed, 5, dim), unit(seed + 1, 5, dim)
    for x, y, found in zip(a, b, dots(a, b), strict=True):
        true = sum((Fraction(float(p)) * Fraction(float(q)) for p, q in zip(x, y, strict=True)), Fraction(0))
        assert Fraction(float(found)) == true
        assert abs(float(np.dot(x.astype(np.float32), y.astype(np.float32))) - true) <= rounding_error(dim)


def test_vectors_of_several_files_are_one(tmp_path: Path) -> None:
    whole = unit(0, 50, 8)
    for number, part in enumerate(np.split(whole, [7, 7, 30])):
        np.save(tmp_path / f"{number}.npy", part)
    vectors = ShardedArray([tmp_path / f"{number}.npy" for number in range(4)])
    assert len(vectors) == 50
    assert vectors.dim == 8
    for rows in ([3, 49, 6, 7, 7, 29], range(5, 40), [], [12]):
        np.testing.assert_array_equal(vectors.take(np.array(rows, dtype=np.int64)), whole[list(rows)])


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_forest_tells_the_components_at_every_threshold(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 12))
    row = st.integers(0, n - 1)
    pairs = data.draw(st.lists(st.tuples(row, row, st.integers(60, 100)), max_size=60))
    pairs = [(min(a, b), max(a, b), score / 100) for a, b, score in pairs if a != b]
    forest = Forest(n)
    similar = np.zeros((n, n))
    known: dict[tuple[int, int], float] = {}
    for a, b, score in pairs:
        score = known.setdefault((a, b), score)  # a pair that is met twice has one similarity
        forest.add(*(np.array([each]) for each in (a, b)), np.array([score], dtype=np.float32))
        similar[a, b] = max(similar[a, b], score)
        if data.draw(st.booleans()):
            forest.compact()
    a, b, scores = forest.edges()
    assert len(a) <= max(n - 1, 0)
    for threshold in (0.6, 0.75, 0.9, 1.0):
        chosen = scores >= threshold - 1e-6
        graph = coo_array((np.ones(chosen.sum()), (a[chosen], b[chosen])), shape=(n, n))
        assert same_groups(connected_components(graph, directed=False)[1], labels_of(similar >= threshold))


def test_halving_leaves_the_same_forest(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = np.unique(np.sort(rng.integers(0, 200, (2, 4000)), axis=0), axis=1)
    scores = rng.uniform(0.6, 1, len(a)).astype(np.float32)
    found = []
    for few in (1 << 17, 100):
        monkeypatch.setattr("curation.similarity.forest._FEW", few)
        forest = Forest(200)
        forest.add(a[a < b], b[a < b], scores[a < b])
        found.append(forest.edges())
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_forest_is_read_as_it_was_saved(tmp_path: Path) -> None:
    forest = Forest(5)
    forest.add(np.array([0, 1]), np.array([1, 4]), np.array([0.7, 0.9], dtype=np.float32))
    forest.save(tmp_path / "forest.npz", done=7)
    again, facts = Forest.load(tmp_path / "forest.npz")
    assert facts == {"done": 7}
    assert again.pairs == 2
    assert same_groups(again.components(), forest.components())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 60), st.floats(0.3, 0.99))
def test_one_cell_joins_as_brute_force(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n: int, threshold: float
) -> None:
    vectors = unit(seed, n)
    join = SelfJoin(Cells.one(4), threshold, ONE, tmp_path_factory.mktemp("join"), 1 << 30)
    found = join.run(ShardedArray([vectors]), np.arange(n)).components()
    assert same_groups(found, labels_of(similarities(vectors) >= threshold))


@pytest.mark.parametrize("way", WAYS, ids=["one thread", "three threads", "torch"])
def test_pairs_of_exactly_the_threshold_are_in(tmp_path: Path, way: WorkerPool) -> None:
    """However the product is rounded: the threshold is the similarity of some pair, or the next number above it."""
    vectors = planted(0, 400, 256)
    true = similarities(vectors)[np.triu_indices(400, 1)]
    for score in np.sort(true[true > 0.6])[::9]:
        for threshold in (score, np.nextafter(score, 2)):
            forest = SelfJoin(Cells.one(256), float(threshold), way, tmp_path, 1 << 30).run(
                ShardedArray([vectors]), np.arange(400)
            )
            assert forest.pairs == (true >= threshold).sum()


def test_a_join_by_cells_misses_little_and_says_how_much(tmp_path: Path) -> None:
    vectors = planted(1, 6000, 64, concepts=30)
    source, rows = ShardedArray([vectors]), np.arange(6000)
    cells = Cells.learn(source.take(np.random.default_rng(0).permutation(6000)[:1600]), 80, 8, 0.07, ONE)
    labels = SelfJoin(cells, 0.6, ONE, tmp_path, 1 << 30).run(source, rows).components()
    true = labels_of(similarities(vectors) >= 0.6)
    removed, should = 6000 - len(np.unique(labels)), 6000 - len(np.unique(true))
    assert 0.97 * should <= removed <= should
    finer = np.unique(np.stack([labels, true]), axis=1)
    assert finer.shape[1] == len(np.unique(labels))  # nothing is joined that should not be
    recall = audit(source, rows, labels, 0.6, np.arange(0, 6000, 2), ONE)
    exact = audit(source, rows, true, 0.6, np.arange(0, 6000, 2), ONE)
    assert exact.facts()["value"] == 1.0
    assert exact.pairs == exact.pairs_connected == ((similarities(vectors) >= 0.6)[::2].sum() - 3000)
    told = recall.facts()
    assert told["value"] > 0.97
    assert told["low"] < told["value"] < told["high"]
    found = [labels[a] == labels[b] for a, b in zip(*np.nonzero(np.triu(similarities(vectors) >= 0.6, 1)), strict=True)]
    assert recall.pairs_connected / recall.pairs == pytest.approx(np.mean(found), abs=0.01)


def test_a_join_does_not_depend_on_threads_memory_device_or_the_order_of_rows(tmp_path: Path) -> None:
    vectors = planted(2, 3000, 32, concepts=20)
    sample = vectors[np.random.default_rng(0).permutation(3000)[:800]]
    learned = [Cells.learn(sample, 40, 6, 0.1, way) for way in WAYS]
    for other in learned[1:]:
        np.testing.assert_array_equal(learned[0].centroids.vectors, other.centroids.vectors)
        np.testing.assert_array_equal(learned[0].dense, other.dense)
    outcomes = []
    for number, (way, memory) in enumerate([(ONE, 1 << 30), (WAYS[1], 1 << 16), (WAYS[2], 1 << 18)]):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        forest = SelfJoin(learned[0], 0.6, way, folder, memory).run(ShardedArray([vectors]), np.arange(3000))
        assert bool(list(folder.glob("run-*.f16"))) == (number > 0)
        outcomes.append(forest.edges())
    for a, b, _ in outcomes[1:]:
        np.testing.assert_array_equal(a, outcomes[0][0])
        np.testing.assert_array_equal(b, outcomes[0][1])
    order = np.random.default_rng(1).permutation(3000)
    turned = (
        SelfJoin(learned[0], 0.6, ONE, tmp_path, 1 << 30)
        .run(ShardedArray([vectors[order]]), np.arange(3000))
        .components()
    )
    straight = (
        SelfJoin(learned[0], 0.6, ONE, tmp_path, 1 << 30).run(ShardedArray([vectors]), np.arange(3000)).components()
    )
    assert same_groups(turned, straight[order])


def test_an_interrupted_join_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = ShardedArray([planted(3, 2000, 16)])
    cells = Cells.learn(vectors.take(np.arange(600)), 200, 4, 0.1, ONE)
    whole = SelfJoin(cells, 0.8, ONE, tmp_path, 1 << 30).run(vectors, np.arange(2000))
    monkeypatch.setattr("curation.similarity.selfjoin._SAVE_SECONDS", 0.0)

    def stop(done: int) -> None:
        if done == 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SelfJoin(cells, 0.8, ONE, tmp_path, 1 << 30).run(vectors, np.arange(2000), stop)
    again: list[int] = []
    forest = SelfJoin(cells, 0.8, ONE, tmp_path, 1 << 30).run(vectors, np.arange(2000), again.append)
    assert again[0] == 64
    for mine, other in zip(forest.edges(), whole.edges(), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("spherical", [True, False])
def test_the_nearest_centroid_is_that_of_brute_force(spherical: bool) -> None:
    rows = halved(np.random.default_rng(0).normal(size=(500, 16)))
    means = np.random.default_rng(1).normal(size=(40, 16)) * 0.2
    centroids = Centroids.from_vectors(means, spherical)
    stored = centroids.vectors.astype(np.float64)
    distances = ((rows.astype(np.float64)[:, None] - stored) ** 2).sum(-1)
    scores = rows.astype(np.float64) @ stored.T
    expected = scores.argmax(1) if spherical else distances.argmin(1)
    for way in WAYS:
        np.testing.assert_array_equal(assign_nearest(rows, centroids, way), expected)


def test_centroids_of_equal_rows_are_told_apart_by_their_number() -> None:
    twice = Centroids(np.repeat(unit(0, 5, 8), 2, axis=0))
    for way in WAYS:
        assert (assign_nearest(unit(1, 50, 8), twice, way) % 2 == 0).all()


def test_kmeans_is_about_as_good_as_that_of_scikit_learn() -> None:
    vectors = planted(4, 3000, 32, concepts=50)
    centroids = train(vectors, np.arange(60), 30, ONE, spherical=False)
    labels = assign_nearest(vectors, centroids, ONE)
    ours = ((vectors.astype(np.float64) - centroids.vectors[labels]) ** 2).sum()
    theirs = KMeans(60, init="random", n_init=1, random_state=0).fit(vectors.astype(np.float64)).inertia_
    assert ours < 1.03 * theirs


def test_a_centroid_that_loses_its_members_gets_others() -> None:
    sample = np.concatenate([np.repeat(unit(0, 1, 8), 50, axis=0), unit(1, 50, 8)])
    centroids = train(sample, np.arange(10), 20, ONE)
    assert len(np.unique(assign_nearest(sample, centroids, ONE))) == 10


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(1, 50), st.integers(1, 30))
def test_neighbors_are_those_of_brute_force(seed: int, n: int, k: int) -> None:
    bank, queries = unit(seed, n, 8), unit(seed + 1, 7, 8)
    scores = queries.astype(np.float64) @ bank.T.astype(np.float64)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    for way in WAYS:
        places, found = k_nearest(queries, ShardedArray([bank]), np.arange(n), k, way)
        np.testing.assert_array_equal(places, expected)
        np.testing.assert_array_equal(found, np.take_along_axis(scores, expected, axis=1))
    best = argmax_above(ShardedArray([queries]), np.arange(7), ShardedArray([bank]), 0.3, ONE)
    above = np.flatnonzero(scores.max(1) >= 0.3)
    np.testing.assert_array_equal(best.rows, above)
    np.testing.assert_array_equal(best.others, scores.argmax(1)[above])


def test_of_many_equal_neighbors_the_first_count() -> None:
    bank, queries = unit(0, 3000, 16), unit(1, 3, 16)
    bank[500:700] = queries[0]
    for way in WAYS:
        places, scores = k_nearest(queries, ShardedArray([bank]), np.arange(3000), 20, way)
        np.testing.assert_array_equal(places[0], np.arange(500, 520))
        assert (np.diff(scores) <= 0).all()
        nothing, _ = k_nearest(np.zeros((1, 16), dtype=np.float16), ShardedArray([bank]), np.arange(3000), 5, way)
        assert (nothing == -1).all()


def test_a_join_where_all_are_alike_keeps_few_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.similarity.selfjoin._MOST_PAIRS", 1000)
    most = []
    add = Forest.add

    def counted(self: Forest, a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> None:
        if self.rows == 900:
            most.append(len(a))
        add(self, a, b, scores)

    vectors = planted(0, 900, 16)
    vectors[:500] = vectors[0]
    expected = labels_of(similarities(vectors) >= 0.7)
    join = SelfJoin(Cells.one(16), 0.7, ONE, tmp_path, 1 << 30)
    monkeypatch.setattr(Forest, "add", counted)
    assert same_groups(join.run(ShardedArray([vectors]), np.arange(900)).components(), expected)
    assert min(most) < 2000  # what the cell hands on; 125,000 pairs are alike


def test_what_another_join_left_is_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, rows = ShardedArray([planted(3, 2000, 16)]), np.arange(2000)
    cells = Cells.learn(vectors.take(np.arange(600)), 200, 4, 0.1, ONE)
    whole = SelfJoin(cells, 0.95, ONE, tmp_path / "x", 1 << 30)
    (tmp_path / "x").mkdir()
    expected = whole.run(vectors, rows).edges()
    monkeypatch.setattr("curation.similarity.selfjoin._SAVE_SECONDS", -1.0)

    def stop(done: int) -> None:
        if done == 128:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SelfJoin(cells, 0.8, ONE, tmp_path, 1 << 30).run(vectors, rows, stop)
    assert (tmp_path / "forest.npz").exists()
    found = SelfJoin(cells, 0.95, ONE, tmp_path, 1 << 30).run(vectors, rows).edges()
    np.testing.assert_array_equal(found[2], expected[2])
    assert not (tmp_path / "forest.npz").exists()


def test_the_compressed_index_finds_most_neighbors() -> None:
    bank, queries = planted(5, 5000, 32, concepts=100), planted(5, 5000, 32, concepts=100)[:200]
    rows = np.arange(len(bank))
    index = IvfPqIndex(bank[np.random.default_rng(0).permutation(5000)], len(rows), 0)
    index.add(ShardedArray([bank]), rows)
    found, _ = rank_candidates(queries, ShardedArray([bank]), rows, np.maximum(index.candidates(queries, 64), 0), 8)
    true, _ = k_nearest(queries, ShardedArray([bank]), rows, 8, ONE)
    hits = np.mean([len(np.intersect1d(a, b)) / 8 for a, b in zip(found, true, strict=True)])
    assert hits > 0.9


def test_zero_vectors_are_like_nothing_and_cost_nothing(tmp_path: Path) -> None:
    """All cells and all other vectors would be as near to them as any."""
    vectors = planted(6, 3000, 32)
    vectors[::2] = 0
    vectors[4] = -0.0
    source, there = ShardedArray([vectors]), np.arange(1, 3000, 2)
    cells = Cells.learn(vectors[there][:400], 40, 8, 0.1, ONE)
    visits = cells.assign(vectors, ONE)
    assert (visits.rows % 2 == 1).all()
    labels = SelfJoin(cells, 0.6, ONE, tmp_path, 1 << 30).run(source, np.arange(3000)).components()
    assert np.bincount(labels)[labels[::2]].max() == 1
    assert len(argmax_above(source, np.arange(3000), source, -1.0, ONE).rows) == 1500
    np.testing.assert_array_equal(assign_nearest(vectors, cells.centroids, ONE)[::2], 0)


@pytest.mark.slow
def test_a_join_keeps_to_its_memory(tmp_path: Path) -> None:
    """Vectors of 205 MB, under a limit of 128 MB beyond what the libraries take; without care they do not fit in."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((400_000, 256), dtype=np.float32)
    vectors[1::50] = vectors[::50] + 0.2 * rng.standard_normal((8000, 256), dtype=np.float32)
    np.save(tmp_path / "vectors.npy", (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))

    def joined(memory: int, limit: int) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, "-m", "tests.memory_program", str(tmp_path / "vectors.npy"), str(memory), str(limit)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            script, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
        )

    within = joined(128 << 20, 128 << 20)
    assert within.returncode == 0, within.stderr
    assert int(within.stdout.split()[0]) > 7900
    assert "MemoryError" in joined(4 << 30, 128 << 20).stderr


@pytest.mark.parametrize("spherical", [True, False])
def test_iterations_that_look_at_moved_centroids_alone_are_lloyds(spherical: bool) -> None:
    sample, workers = planted(5, 3000, 16, concepts=40), WorkerPool(CpuTiles(), 1)
    centroids = Centroids.from_vectors(sample[:100].astype(np.float64), spherical)
    labels = assign_nearest(sample, centroids, workers)
    for _ in range(6):
        moved = kmeans._update_centroids(sample, labels, centroids, spherical)
        labels = kmeans._replace_empty(sample, labels, centroids, moved, workers)
        np.testing.assert_array_equal(labels, assign_nearest(sample, moved, workers))
        centroids = moved


@given(st.integers(1, 300), st.floats(0.1, 60), st.integers(0, 1 << 30))
def test_distances_of_rounded_rows_are_exact_in_float32(dim: int, length: float, seed: int) -> None:
    vectors = (unit(seed, 20, dim).astype(np.float64) * length).astype(np.float16)
    whole = round_to_float16(vectors)
    true = ((whole[:, None].astype(np.float64) - whole[None].astype(np.float64)) ** 2).sum(2)
    lengths = np.einsum("ij,ij->i", whole, whole)
    np.testing.assert_array_equal(lengths[:, None] + lengths - 2 * (whole @ whole.T), true)
    assert np.abs(whole).max(initial=0) >= 100  # not all of it is rounded away


def test_seeds_are_different_rows_that_lie_apart() -> None:
    vectors = halved(np.repeat(np.eye(40), 50, axis=0) + np.random.default_rng(0).normal(size=(2000, 40)) / 100)
    chosen = kmeans_plus_plus.kmeans_plus_plus(vectors, 40, WorkerPool(CpuTiles(), 2), np.random.default_rng(1))
    assert len(set((chosen // 50).tolist())) >= 38  # of a draw by chance 25 would be
    same = kmeans_plus_plus.kmeans_plus_plus(
        np.repeat(vectors[:3], 5, axis=0), 10, WorkerPool(CpuTiles(), 1), np.random.default_rng(1)
    )
    assert len(np.unique(same)) == 10


def test_artifacts_of_ties_are_the_same_for_any_memory_and_moment_of_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = np.repeat(planted(2, 400, 16), 3, axis=0)
    step = {"kind": "near_duplicates", "threshold": 0.7, "num_cells": 30, "allow_chains": True}
    hashes = []
    for number, (memory, seconds) in enumerate(((1.0, 60.0), (1e-4, 60.0), (3e-4, -1.0))):
        monkeypatch.setattr("curation.similarity.selfjoin._SAVE_SECONDS", seconds)
        artifact, _ = curated(tmp_path / str(number), pool(tmp_path, vectors), step, memory_gb=memory)
        hashes.append({file.path: file.sha256 for file in artifact.manifest.files})
    assert hashes[0] == hashes[1] == hashes[2]
    assert {"step-00-pairs.parquet", "step-00-visits.npz", "selection.parquet"} <= set(hashes[0])


@given(st.lists(st.floats(-2, 2, width=32), max_size=50))
def test_the_order_of_pairs_is_that_of_their_similarities(values: list[float]) -> None:
    scores = np.array(values, dtype=np.float32) + np.float32(0)  # of -0 too
    np.testing.assert_array_equal(_sort_descending(scores), np.argsort(-scores, kind="stable"))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.lists(st.integers(0, 10_000), max_size=20))
def test_rows_of_chunked_strings_are_arrows(sizes: list[int], wanted: list[int]) -> None:
    chunks = [pa.array([f"{number}-{i}" for i in range(size)], pa.string()) for number, size in enumerate(sizes)]
    column = pa.chunked_array(chunks, pa.string())
    rows = np.array(wanted, dtype=np.int64) % max(len(column), 1) if len(column) else np.empty(0, dtype=np.int64)
    assert take_chunked(column, rows).to_pylist() == column.take(pa.array(rows)).to_pylist()
