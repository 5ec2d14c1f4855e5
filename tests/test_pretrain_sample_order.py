"""The order of samples: every one once an epoch, the same on any number of ranks, well mixed, weighted where asked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pretrain.data.loader import RankBatchSampler
from pretrain.data.sample_order import SampleOrder, feistel_permutation

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)


def ends(sizes: list[int]) -> np.ndarray:
    return np.cumsum(np.array(sizes, dtype=np.int64))


def epoch(order: SampleOrder, number: int) -> np.ndarray:
    return order.rows_at(np.arange(number * order.size, (number + 1) * order.size))


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**70), min_size=1, max_size=4))
def test_permutations_are_permutations(size: int, key: list[int]) -> None:
    assert sorted(feistel_permutation(np.arange(size), size, key)) == list(range(size))


@given(st.integers(0, 1000), SIZES, st.integers(0, 5), st.sampled_from([None, 2, 3, 100]))
def test_every_epoch_shows_every_sample_once(seed: int, sizes: list[int], number: int, window: int | None) -> None:
    order = SampleOrder(seed, 7, ends(sizes), window)
    assert sorted(epoch(order, number)) == list(range(sum(sizes)))


@given(SIZES, st.integers(2, 5))
def test_a_window_is_seen_before_the_next_one(sizes: list[int], window: int) -> None:
    order = SampleOrder(1, 7, ends(sizes), window)
    shards = np.searchsorted(ends(sizes), epoch(order, 0), side="right")
    first_seen = {int(shard): at for at, shard in reversed(list(enumerate(shards)))}
    last_seen = {int(shard): at for at, shard in enumerate(shards)}
    for shard in first_seen:
        before = [other for other in first_seen if last_seen[other] < first_seen[shard]]
        together = len(first_seen) - len(before) - sum(first_seen[o] > last_seen[shard] for o in first_seen)
        assert together <= window


def test_any_place_alone_gives_what_all_together_give() -> None:
    for order in (SampleOrder(0, 7, ends([30, 50, 20]), None), SampleOrder(0, 7, ends([30, 50, 20]), 2)):
        places = np.random.default_rng(0).integers(0, 1000, 200)
        together = order.rows_at(places)
        assert together.tolist() == [int(order.rows_at(np.array([place]))[0]) for place in places]


def test_seed_epoch_and_corpora_decide_the_order() -> None:
    seen = [
        epoch(SampleOrder(seed, identity, ends([500])), number).tolist()
        for seed, identity, number in itertools.product((0, 1), (5, 6), (0, 1))
    ]
    assert all(a != b for a, b in itertools.combinations(seen, 2))


@given(
    st.integers(0, 40),
    st.lists(st.sampled_from([(1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 2, 1), (1, 2, 4)]), min_size=1, max_size=4),
)
def test_ranks_may_come_and_go_within_an_epoch(first: int, worlds: list[tuple[int, int, int]]) -> None:
    """Each phase of a training runs on another world; all of them together see the places one after the other."""
    seen, step, read = first, first, []
    for world_size, micro_batch, accumulation in worlds:
        phases = [
            RankBatchSampler(rank, world_size, micro_batch, accumulation, step, step + 3, seen)
            for rank in range(world_size)
        ]
        ranks = [np.concatenate(list(place)) for place in phases]
        assert len(np.unique(np.concatenate(ranks))) == 24  # disjoint
        for number in range(3):
            per_step = [rank.reshape(3, accumulation, micro_batch)[number] for rank in ranks]
            read.append(np.stack(per_step, axis=1).reshape(-1))
        seen, step = seen + 24, step + 3
    assert np.concatenate(read).tolist() == list(range(first, seen))


def test_a_permutation_is_as_good_as_chance() -> None:
    """Places and rows, cut into ten parts each, meet as often as chance has it; so do neighbors."""
    size = 40_000
    for number in range(5):
        rows = feistel_permutation(np.arange(size), size, (3, number))
        counts = np.histogram2d(np.arange(size), rows, bins=10)[0]
        assert stats.chisquare(counts.ravel()).pvalue > 1e-4
        gaps = np.abs(np.diff(rows))
        assert abs(gaps.mean() / (size / 3) - 1) < 0.02


@pytest.mark.parametrize("window", [None, 3])
def test_samples_are_seen_as_often_as_their_weights_say(window: int | None) -> None:
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=300)
    weights[::7] = 0
    order = SampleOrder(0, 7, ends([60] * 5), window, weights)
    counts = np.stack([np.bincount(epoch(order, number), minlength=300) for number in range(60)])
    expected = weights * 300 / weights.sum()
    assert (counts[:, ::7] == 0).all()
    assert (np.abs(counts - expected) < 1 + 1e-9).all()
    np.testing.assert_allclose(counts.mean(0), expected, atol=0.25)


def test_equal_weights_are_none() -> None:
    order = SampleOrder(0, 7, ends([50, 50]), None, np.full(100, 0.3))
    assert sorted(epoch(order, 3)) == list(range(100))
