"""Curation steps against brute force and against known truth."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import curation
from curation import run
from curation.config import CurateConfig, CurateSettings, EmbedConfig, MaterializeConfig
from curation.embed import embed
from curation.materialize import materialize
from curation.selection_state import SelectionState
from curation.steps.balance import evenness, split_target
from curation.synthetic.ground_truth_metrics import score_known_leaks, score_synthetic
from infra.config import load_yaml
from infra.corpus.corpus import Corpus
from infra.errors import UserError
from pretrain.backbones.config import PixelDescriptorConfig
from tests.conftest import SyntheticCorpora, ingest_folder
from tests.pools import Pool, curated, halved, planted, pool, unit

COPIES = PixelDescriptorConfig(side=16, frequencies=8, whiten=1.5)
LIKENESS = PixelDescriptorConfig(side=16, frequencies=16, whiten=1.0, signs=False)


def similarities(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) @ b.astype(np.float64).T


def groups(vectors: np.ndarray, threshold: float) -> list[list[int]]:
    """Connected components of more than one, by scipy."""
    labels = connected_components(coo_array(similarities(vectors, vectors) >= threshold), directed=False)[1]
    found = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    return [each for each in found if len(each) > 1]


def digest(number: int) -> str:
    return hashlib.sha256(bytes([number % 256, number // 256])).hexdigest()


def kept(ledger: list[dict[str, Any]]) -> np.ndarray:
    return np.array([row["keep"] for row in ledger])


def test_exact_copies_go_and_the_first_key_stays(tmp_path: Path) -> None:
    hashes = [{"sha256": letter * 64} for letter in "abacabd"]
    _, ledger = curated(tmp_path, pool(tmp_path, unit(0, 7), rows=hashes), {"kind": "exact"})
    assert kept(ledger).tolist() == [True, True, False, True, False, False, True]
    assert [row["matched_key"] for row in ledger] == [None, None, "k0000", None, "k0000", "k0001", None]
    assert [row["weight"] for row in ledger if row["keep"]] == [3, 2, 1, 1]
    assert ledger[0]["duplicate_group"] == ledger[2]["duplicate_group"] == ledger[4]["duplicate_group"]


@pytest.mark.parametrize("policy", ["resolution", "bytes", "first_key", "quality", "license"])
def test_of_each_component_the_preferred_image_stays_and_stands_for_all(tmp_path: Path, policy: str) -> None:
    vectors, rng = planted(1, 60, 8), np.random.default_rng(2)
    licenses = rng.choice(["cc0", "cc-by", "unknown"], 60).tolist()
    quality = rng.integers(0, 5, 60).tolist()
    sides = rng.integers(1, 9, 60).tolist()
    rows = [
        {"width": side, "height": 3, "json": json.dumps({"license": license, "quality": value}).encode()}
        for side, license, value in zip(sides, licenses, quality, strict=True)
    ]
    step: dict[str, Any] = {"kind": "near_duplicates", "threshold": 0.8, "representative": policy}
    order = {"cc0": 1, "cc-by": 2, "unknown": 3}
    better = {
        "resolution": lambda i: (-sides[i], i),
        "bytes": lambda i: (0, i),  # the images are of one size
        "first_key": lambda i: i,
        "quality": lambda i: (-quality[i], i),
        "license": lambda i: (order[licenses[i]], i),
    }[policy]
    if policy in ("quality", "license"):
        step |= {"representative": "field", "field": policy}
        step |= {"prefer": ["cc0", "cc-by"]} if policy == "license" else {}
    artifact, ledger = curated(tmp_path, pool(tmp_path, vectors, rows=rows), step)
    for group in groups(vectors, 0.8):
        stays = min(group, key=better)
        assert [i for i in group if ledger[i]["keep"]] == [stays]
        assert ledger[stays]["weight"] == len(group)
        assert {ledger[i]["matched_key"] for i in group} - {None} == {f"k{stays:04d}"}
        assert len({ledger[i]["duplicate_group"] for i in group}) == 1
        for i in set(group) - {stays}:
            assert ledger[i]["score"] == np.float32(similarities(vectors[[i]], vectors[[stays]])[0, 0])
    (told,) = artifact.metrics["steps"]
    assert told["dropped"] == sum(len(group) - 1 for group in groups(vectors, 0.8))
    assert told["recall"]["value"] == 1.0
    assert told["worst"][0]["diameter"] <= told["worst"][0]["to_representative"] + 1e-3


def test_the_curve_and_the_pairs_tell_what_higher_thresholds_would_drop(tmp_path: Path) -> None:
    vectors = planted(3, 300, 16)
    step = {"kind": "near_duplicates", "threshold": 0.6, "allow_chains": True}
    artifact, _ = curated(tmp_path, pool(tmp_path, vectors), step)
    for threshold, dropped in artifact.metrics["steps"][0]["curve"][:-1]:
        assert dropped == sum(len(group) - 1 for group in groups(vectors, threshold))
    pairs = pq.read_table(artifact.local_file("step-00-pairs.parquet")).to_pydict()
    assert np.allclose(
        pairs["similarity"],
        [similarities(vectors, vectors)[a, b] for a, b in zip(pairs["row"], pairs["other"], strict=True)],
    )


def test_chains_fall_apart_where_members_are_unlike_what_stands_for_them(tmp_path: Path) -> None:
    angles = np.linspace(0, np.pi / 2, 10)
    arc = halved(np.stack([np.cos(angles), np.sin(angles)], axis=1))
    step = {"kind": "near_duplicates", "threshold": 0.9, "representative": "first_key"}
    whole, ledger = curated(tmp_path, pool(tmp_path, arc), step)
    assert kept(ledger).sum() == 1
    (worst,) = whole.metrics["steps"][0]["worst"]
    assert worst["images"] == 10
    assert worst["diameter"] == pytest.approx(0, abs=1e-3)
    split, ledger = curated(tmp_path, pool(tmp_path, arc), {**step, "min_similarity_to_representative": 0.9})
    assert split.metrics["steps"][0]["groups_split_off"] == kept(ledger).sum() - 1 == 3
    assert min(row["score"] for row in ledger if not row["keep"]) >= 0.9
    assert sum(row["weight"] for row in ledger if row["keep"]) == 10


def test_leaks_are_those_of_brute_force_in_both_readings(tmp_path: Path) -> None:
    vectors = planted(4, 400, 16)
    tests = [unit(5, 20, 16), halved(vectors[:30].astype(float) + 0.05 * unit(6, 30, 16))]
    target = pool(tmp_path, vectors)
    others = [pool(tmp_path, each, f"t{i}-") for i, each in enumerate(tests)]
    scores = np.stack([similarities(vectors, each).max(1) for each in tests])
    direct = (scores >= 0.8).any(0)
    labels = connected_components(coo_array(similarities(vectors, vectors) >= 0.8), directed=False)[1]
    components = np.isin(labels, labels[direct])
    for drop, gone in (("hits", direct), ("components", components)):
        step = {"kind": "decontaminate", "threshold": 0.8, "drop": drop}
        artifact, ledger = curated(tmp_path, target, step, eval_embeddings=[each.embeddings for each in others])
        np.testing.assert_array_equal(kept(ledger), ~gone)
        for row, best in zip(ledger, scores.T, strict=True):
            if row["reason"] == "leak":
                number = int(best[1] > best[0])
                assert row["score"] == np.float32(best[number])
                assert row["matched_key"].startswith(f"t{number}-")
            elif not row["keep"]:
                assert row["reason"] == "leak_component"
                assert ledger[int(row["matched_key"][1:])]["reason"] == "leak"
        told = artifact.metrics["steps"][0]["sets"]
        for number, score in enumerate(scores):
            facts = told[f"eval_embeddings_{number}"]
            inside = np.isin(labels, labels[score >= 0.8])
            assert facts["leaks"] == (score >= 0.8).sum()
            assert facts["collateral"] == inside.sum() - (score >= 0.8).sum()
            assert sum(count for _, count in facts["histogram"]) == (score >= 0.65).sum()


def test_retrieval_keeps_the_neighbors_of_brute_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, seed = unit(5, 60), unit(6, 9)
    target, curated_seed = pool(tmp_path, vectors), pool(tmp_path, seed, "s")
    nearest = np.argsort(-similarities(seed, vectors), axis=1, kind="stable")[:, :5]
    step = {"kind": "retrieve", "k": 5}
    artifact, ledger = curated(tmp_path, target, step, seed_embeddings=curated_seed.embeddings)
    assert set(np.flatnonzero(kept(ledger))) == set(nearest.ravel())
    told = artifact.metrics["steps"][0]
    assert told["collisions"] == nearest.size - len(np.unique(nearest))
    best = similarities(vectors, seed)
    assert all(row["matched_key"] == f"s{best[i].argmax():04d}" for i, row in enumerate(ledger))

    own, ledger = curated(
        tmp_path, target, {**step, "k": 3, "without_replacement": True}, seed_embeddings=curated_seed.embeddings
    )
    told = own.metrics["steps"][0]
    assert told["collisions"] == 0
    assert kept(ledger).sum() == 27 - told["missing"] >= 25

    monkeypatch.setattr("curation.steps.retrieve._INDEXED", 1)
    indexed, ledger = curated(tmp_path, target, {**step, "index": "ivfpq"}, seed_embeddings=curated_seed.embeddings)
    assert indexed.metrics["steps"][0]["recall"]["value"] > 0.8


def test_retrieval_by_clusters_keeps_what_is_near_enough_seeds(tmp_path: Path) -> None:
    centers = np.eye(4, 8)
    vectors = halved(np.repeat(centers, 25, axis=0) + 0.1 * np.random.default_rng(0).normal(size=(100, 8)))
    seed = halved(np.concatenate([centers[[0] * 5], centers[[1] * 4], centers[[2] * 1]]) + 0.01)
    target, curated_seed = pool(tmp_path, vectors), pool(tmp_path, seed, "s")
    step = {"kind": "retrieve_clusters", "clusters": 4, "min_seeds": 4, "quota": 10}
    artifact, ledger = curated(tmp_path, target, step, seed_embeddings=curated_seed.embeddings)
    chosen = np.flatnonzero(kept(ledger)) // 25
    assert np.bincount(chosen, minlength=4).tolist() == [10, 10, 0, 0]
    assert artifact.metrics["steps"][0]["clusters_with_seeds"] == 2
    _, ledger = curated(tmp_path, target, {**step, "most": 13}, seed_embeddings=curated_seed.embeddings)
    assert np.bincount(np.flatnonzero(kept(ledger)) // 25, minlength=4).tolist() == [10, 3, 0, 0]


def test_semdedup_drops_what_brute_force_drops_and_any_eps_can_follow(tmp_path: Path) -> None:
    vectors = planted(7, 200, 8)
    step = {"kind": "semdedup", "clusters": 1, "eps": 0.2}
    artifact, ledger = curated(tmp_path, pool(tmp_path, vectors), step)
    scores = pq.read_table(artifact.local_file("step-00-scores.parquet")).to_pydict()
    order = scores["row"]  # from the farthest from the centroid to the nearest
    similar = similarities(vectors[order], vectors[order])
    expected = {order[i] for i in range(1, 200) if similar[i, :i].max() > 0.8}
    assert set(np.flatnonzero(~kept(ledger))) == expected
    assert np.float32(scores["similarity"][1:]).tolist() == [np.float32(similar[i, :i].max()) for i in range(1, 200)]
    assert dict(map(tuple, artifact.metrics["steps"][0]["curve"]))[0.2] == len(expected)
    mean = vectors.astype(np.float64).mean(0)
    assert np.corrcoef(np.arange(200), similarities(vectors[order], mean[None])[:, 0])[0, 1] > 0.9


def test_semdedup_of_large_clusters_is_that_of_brute_force(tmp_path: Path) -> None:
    vectors = planted(3, 1300, 8)
    vectors[100:140] = vectors[100]
    artifact, _ = curated(tmp_path, pool(tmp_path, vectors), {"kind": "semdedup", "clusters": 1})
    scores = pq.read_table(artifact.local_file("step-00-scores.parquet")).to_pydict()
    order = np.array(scores["row"])
    similar = np.tril(similarities(vectors[order], vectors[order]), -1) - 2 * np.triu(np.ones((1300, 1300)))
    np.testing.assert_array_equal(scores["other"][1:], order[similar[1:].argmax(1)])


def test_a_leak_that_is_the_image_itself_is_in_the_histogram(tmp_path: Path) -> None:
    vectors = planted(5, 200, 256)
    target, test = pool(tmp_path, vectors), pool(tmp_path, vectors[:60], "t")
    artifact, _ = curated(
        tmp_path, target, {"kind": "decontaminate", "threshold": 0.93}, eval_embeddings=[test.embeddings]
    )
    facts = artifact.metrics["steps"][0]["sets"]["eval_embeddings_0"]
    assert sum(count for edge, count in facts["histogram"] if edge >= 0.93) == facts["leaks"] >= 60


def test_a_killed_step_leaves_nothing_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between saving the verdicts of a step and removing what the step needed."""
    vectors = planted(8, 600, 16)
    step = {"kind": "near_duplicates", "num_cells": 12, "allow_chains": True}
    steps = [{**step, "threshold": value} for value in (0.9, 0.7)]
    target = pool(tmp_path, vectors)
    _, whole = curated(tmp_path, target, *steps)
    monkeypatch.setattr("curation.similarity.selfjoin._SAVE_SECONDS", -1.0)
    monkeypatch.setattr("pathlib.Path.unlink", lambda *arguments, **named: None)
    save = SelectionState.save

    def killed(*arguments: Any) -> None:
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(SelectionState, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        curated(tmp_path / "run", pool(tmp_path, vectors), *steps)
    assert list((tmp_path / "run").rglob("forest.npz"))
    monkeypatch.undo()
    assert curated(tmp_path / "run", pool(tmp_path, vectors), *steps)[1] == whole


def test_a_balanced_draw_is_more_even_than_the_pool_and_reaches_rare_concepts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([400, 200, 100, 50, 25, 12, 8, 5])
    concept = np.repeat(np.arange(8), sizes)
    vectors = halved(np.eye(8, 16)[concept] + 0.1 * rng.normal(size=(800, 16)))
    step = {"kind": "balance", "levels": [40, 8], "target": 160}
    artifact, ledger = curated(tmp_path, pool(tmp_path, vectors), step)
    drawn = np.bincount(concept[kept(ledger)], minlength=8)
    assert drawn.sum() == 160
    best = evenness(split_target(sizes, 160, rng))["gini"]  # with the concepts known
    assert evenness(drawn)["gini"] < best + 0.3 * (evenness(sizes)["gini"] - best)
    assert (drawn[5:] >= 0.8 * sizes[5:]).all()
    top = artifact.metrics["steps"][0]["levels"][-1]
    assert top["after"]["gini"] < top["before"]["gini"]

    _, ledger = curated(tmp_path, pool(tmp_path, vectors), {**step, "target": 1200, "max_repeats": 3})
    weights = np.array([row["weight"] for row in ledger])
    assert weights[kept(ledger)].sum() == 1200
    assert weights.max() == 3


def test_shares_are_exact_and_even() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 30, rng.integers(1, 12))
        target = int(rng.integers(0, sizes.sum() + 5))
        taken = split_target(sizes, target, rng)
        assert taken.sum() == min(target, sizes.sum())
        assert (taken <= sizes).all()
        least = taken[taken < sizes].min(initial=taken.max(initial=0))
        assert (taken <= least + 1).all()  # nobody has two more than one who could have had more


def test_filters_by_size_and_caption(tmp_path: Path) -> None:
    rows = [
        {"width": 300, "height": 300, "caption": "a good caption"},
        {"width": 300, "height": 100, "caption": "a good caption"},
        {"width": 800, "height": 200, "caption": "a good caption"},
        {"width": 300, "height": 300, "caption": "two  words "},
        {"width": 300, "height": 300, "caption": "a b c"},
        {"width": 300, "height": 300, "caption": None},
    ]
    step = {"kind": "metadata_filter", "min_side": 200, "max_aspect": 3, "min_words": 3, "min_characters": 6}
    artifact, ledger = curated(tmp_path, pool(tmp_path, unit(0, 6), rows=rows), step)
    words = "too_few_words"
    assert [row["reason"] for row in ledger] == [
        "kept", "too_small", "aspect_ratio", words, "too_few_characters", words
    ]  # fmt: skip
    assert ledger[2]["score"] == 4
    assert artifact.metrics["steps"][0]["dropped"] == 5


def test_what_is_listed_goes_and_what_was_dropped_may_come_back(tmp_path: Path) -> None:
    vectors = halved(np.repeat(unit(0, 4, 8).astype(float), 3, axis=0) + 0.2 * unit(1, 12, 8))
    target = pool(tmp_path, vectors, rows=[{"sha256": digest(i)} for i in range(12)])
    (tmp_path / "keys.txt").write_text("k0003\n\nk0004\nunknown\n")
    (tmp_path / "hashes.txt").write_bytes(b"\xef\xbb\xbf" + f"{digest(11).upper()}\r\n{digest(99)}\n".encode())
    gone = {"kind": "exclude", "keys": str(tmp_path / "keys.txt"), "hashes": str(tmp_path / "hashes.txt")}
    artifact, ledger = curated(tmp_path, target, gone, {"kind": "exclude", "prefix": "k000"})
    assert artifact.metrics["steps"][0]["unknown_lines"] == 2
    assert np.flatnonzero(kept(ledger)).tolist() == [10]
    near = {"kind": "near_duplicates", "threshold": 0.8, "representative": "first_key"}
    artifact, ledger = curated(tmp_path, target, near, {"kind": "restore", "reason": "near_duplicate", "below": 0.99})
    _, before = curated(tmp_path, target, near)
    back = [not old["keep"] and old["score"] < 0.99 for old in before]
    assert artifact.metrics["steps"][1]["restored"] == sum(back) > 0
    for new, old, restored in zip(ledger, before, back, strict=True):
        assert new["keep"] == (old["keep"] or restored)
    assert sum(row["weight"] for row in ledger if row["keep"]) == 12
    with pytest.raises(UserError, match="reasons here are near_duplicate"):
        curated(tmp_path, target, near, {"kind": "restore", "reason": "leaks"})
    first, _ = curated(tmp_path, target, near)
    _, later = curated(
        tmp_path, target, {"kind": "restore", "reason": "near_duplicate", "below": 0.99}, selection=first.url
    )
    assert [row["duplicate_group"] for row in later] == [row["duplicate_group"] for row in ledger]
    assert [row["weight"] for row in later if row["keep"]] == [row["weight"] for row in ledger if row["keep"]]
    (tmp_path / "hashes.txt").write_text("nonsense")
    with pytest.raises(UserError, match="not a SHA-256"):
        curated(tmp_path, target, gone)
    (tmp_path / "hashes.txt").write_text("")
    (tmp_path / "keys.txt").write_text("k0005\n")  # another content is another selection
    assert curated(tmp_path, target, gone)[1][5]["reason"] == "removed"


EVERYTHING: list[dict[str, Any]] = [
    {"kind": "exact"},
    {"kind": "near_duplicates", "threshold": 0.8, "representative": "first_key", "num_cells": 12, "nprobe": 4},
    {"kind": "decontaminate", "threshold": 0.8, "drop": "components"},
    {"kind": "semdedup", "clusters": 5, "eps": 0.3},
    {"kind": "retrieve_clusters", "clusters": 6, "min_seeds": 1, "quota": 90, "most": 330},
    {"kind": "retrieve", "k": 20},
    {"kind": "balance", "levels": [20, 5], "target": 60},
]


def everything(folder: Path, vectors: np.ndarray, keys: list[str], **settings: Any) -> list[dict[str, Any]]:
    target = pool(folder, vectors, keys=keys, rows=[{"sha256": digest(int(key[1:]) % 500)} for key in keys])
    test, seed = pool(folder, planted(9, 20, 16), "t"), pool(folder, planted(9, 30, 16), "s")
    return curated(
        folder, target, *EVERYTHING, eval_embeddings=[test.embeddings], seed_embeddings=seed.embeddings, **settings
    )[1]


def test_verdicts_do_not_depend_on_order_threads_or_memory(tmp_path: Path) -> None:
    vectors = planted(8, 600, 16)
    vectors[300:420] = vectors[300]  # equally similar to everything
    keys = [f"k{i:04d}" for i in range(600)]
    base = everything(tmp_path / "base", vectors, keys)
    assert everything(tmp_path / "small", vectors, keys, memory_gb=1e-5, workers=3) == base
    order = np.random.default_rng(0).permutation(600)
    turned = everything(tmp_path / "turned", vectors[order], [keys[i] for i in order])
    assert sorted(turned, key=lambda row: row["key"]) == base
    assert 0 < kept(base).sum() < 600


@pytest.mark.parametrize("after", range(1, len(EVERYTHING)))
def test_an_interrupted_curation_goes_on_after_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    vectors, keys = planted(8, 600, 16), [f"k{i:04d}" for i in range(600)]
    whole = everything(tmp_path / "whole", vectors, keys)
    import curation.steps.run as stage

    made: list[str] = []
    apply = stage._apply

    def counted(step: Any, context: Any) -> dict[str, Any]:
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(step.kind)
        return apply(step, context)

    monkeypatch.setattr(stage, "_apply", counted)
    with pytest.raises(KeyboardInterrupt):
        everything(tmp_path / "run", vectors, keys)
    monkeypatch.setattr(stage, "_apply", lambda step, context: made.append(step.kind) or apply(step, context))
    assert everything(tmp_path / "run", vectors, keys) == whole
    assert made == [step["kind"] for step in EVERYTHING]


def test_a_later_selection_goes_on_from_an_earlier_one(tmp_path: Path) -> None:
    vectors = planted(8, 300, 16)
    target = pool(tmp_path, vectors)
    steps = [{"kind": "near_duplicates", "threshold": 0.9}, {"kind": "near_duplicates", "threshold": 0.7}]
    _, at_once = curated(tmp_path, target, *steps)
    first, _ = curated(tmp_path, target, steps[0])
    _, then = curated(tmp_path, target, steps[1], selection=first.url)
    assert then == at_once
    assert sum(row["weight"] for row in then if row["keep"]) == 300


def embedded_urls(corpora: SyntheticCorpora, backbone: PixelDescriptorConfig, out: Path) -> dict[str, str]:
    return {
        role: embed(EmbedConfig(backbone=backbone, corpus=getattr(corpora, role), out=str(out / "{id}"))).url
        for role in ("pool", "seed", "test")
    }


def test_the_synthetic_pool_is_cleaned(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    copies, likeness = embedded_urls(synthetic, COPIES, tmp_path), embedded_urls(synthetic, LIKENESS, tmp_path)
    near_duplicates = {"kind": "near_duplicates", "threshold": 0.95}
    clean, _ = curated(
        tmp_path,
        Pool(synthetic.pool, copies["pool"], []),
        {"kind": "exact"},
        near_duplicates,
        {"kind": "decontaminate", "threshold": 0.88},
        eval_embeddings=[copies["test"]],
    )
    near, ledger = curated(
        tmp_path,
        Pool(synthetic.pool, likeness["pool"], []),
        {"kind": "retrieve", "k": 8},
        seed_embeddings=likeness["seed"],
        selection=clean.url,
    )
    scores = score_synthetic(near.url, synthetic.truth)
    assert scores["dedup"]["recall"] > 0.75
    assert scores["decontamination"]["precision"] > 0.9
    assert scores["decontamination"]["recall"] > 0.8
    junk = np.mean([each["kind"] != "photo" for each in json.loads(synthetic.truth.read_text()).values()])
    assert scores["retrieval"]["precision"] > 1 - junk + 0.2

    assert all(row["reason"] for row in ledger)
    smaller = Corpus.open(
        materialize(MaterializeConfig(corpus=synthetic.pool, selection=near.url, out=str(tmp_path / "small"))).url
    )
    whole = Corpus.open(synthetic.pool)
    originals = {key: whole.read_image(row) for row, key in enumerate(whole.keys)}
    assert smaller.keys == [row["key"] for row in ledger if row["keep"]]
    assert all(smaller.read_image(row) == originals[key] for row, key in enumerate(smaller.keys))


def test_a_selection_over_another_corpus_is_refused(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    exact: Any = [{"kind": "exact"}]
    of_seed = run(CurateConfig(steps=exact, corpus=synthetic.seed, out=str(tmp_path / "seed")))
    with pytest.raises(UserError, match="judges another corpus"):
        run(CurateConfig(steps=exact, corpus=synthetic.pool, selection=of_seed.url, out=str(tmp_path / "x")))


def test_a_step_without_its_input_is_named(synthetic: SyntheticCorpora, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="embeddings: needed by the step near_duplicates"):
        run(CurateConfig(corpus=synthetic.pool, out=str(tmp_path / "x")))


def test_a_step_that_leaves_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the step metadata_filter leaves no image"):
        curated(tmp_path, pool(tmp_path, unit(0, 5)), {"kind": "metadata_filter", "min_side": 9})


@pytest.mark.slow
def test_known_leaks_of_cifar10_are_found(shared_data: Path, tmp_path: Path) -> None:
    """Test images listed as near-duplicates of training images of two shards, against those shards."""
    folder = shared_data / "cifar10"
    target = ingest_folder(folder / "train-{000000..000001}.tar.gz", tmp_path / "pool")
    test = ingest_folder(folder / "test-*.tar.gz", tmp_path / "test")
    urls = [
        embed(EmbedConfig(backbone=COPIES, corpus=each.artifact.url, out=str(tmp_path / "{id}"))).url
        for each in (target, test)
    ]
    selection, _ = curated(
        tmp_path,
        Pool(target.artifact.url, urls[0], []),
        {"kind": "decontaminate", "threshold": 0.9, "count_components": False},
        eval_embeddings=[urls[1]],
    )
    scores = score_known_leaks(selection.url, folder / "near_duplicates_test_train.csv", "train_key")
    assert scores["listed"] > 20
    assert scores["recall"] > 0.6
    assert selection.metrics["kept"] > 0.9 * len(target)


@pytest.mark.parametrize("recipe", ["dedup", "dinov2", "dinov3", "retrieve"])
def test_recipes_are_settings_of_curations(recipe: str) -> None:
    folder = Path(curation.__file__).parent / "recipes"
    assert CurateSettings.model_validate(load_yaml(str(folder / f"{recipe}.yaml"))).steps
