"""Balanced sampling over a hierarchy of clusters (Vo et al., arXiv 2405.15613, section 3.3; DINOv3)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from curation.context import Context
from curation.similarity.clusters import rank_within
from curation.similarity.hierarchy import Level, hierarchy
from curation.steps.config import Balance

_RARE = 0.1  # share of the images


def balance(context: Context, step: Balance) -> Mapping[str, Any]:
    """Draw as evenly as can be over the clusters of the highest level, within each over those below, and so on."""
    verdicts = context.state
    rows = verdicts.sort_by_key(verdicts.kept_rows())
    generator = context.generator()
    sizes = [min(size, len(rows)) for size in step.levels]
    members = step.sample_size or [max(above // (2 * size), 1) for above, size in pairwise([len(rows), *sizes])]
    levels = hierarchy(
        context.vectors,
        rows,
        sizes,
        step.num_resampling_steps,
        members,
        context.workers,
        generator,
        context.report_progress,
    )
    drawn = sample_rows(levels, step.target, step.max_repeats, generator)
    kept = drawn > 0
    verdicts.drop(rows[~kept], step.kind, "not_sampled", -1, np.nan)
    if step.max_repeats > 1:
        verdicts.weight[rows[kept]] = drawn[kept]
    told = [
        evenness_by_level(len(level.centroids), of, drawn)
        for level, of in zip(levels, flatten_levels(levels), strict=True)
    ]
    return {"dropped": int((~kept).sum()), "drawn": int(drawn.sum()), "levels": told}


def evenness_by_level(clusters: int, of: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """How evenly rows lie over the clusters of a level, before the draw and after it."""
    before, after = np.bincount(of, minlength=clusters), np.bincount(of, weights=drawn, minlength=clusters)
    rare = np.isin(of, find_rarest(before))
    return {
        "images_of_rare": int(rare.sum()),
        "kept_of_rare": round(float((drawn[rare] > 0).mean()), 4),
        "kept_of_all": round(float((drawn > 0).mean()), 4),
        "clusters": clusters,
        "before": evenness(before),
        "after": evenness(after),
        "reached_before": int((before > 0).sum()),
        "reached_after": int((after > 0).sum()),
    }


def find_rarest(sizes: np.ndarray) -> np.ndarray:
    """The smallest clusters that together hold a tenth of all images, at least one."""
    there = np.flatnonzero(sizes)
    order = there[np.argsort(sizes[there], kind="stable")]
    count = int(np.searchsorted(np.cumsum(sizes[order]), sizes.sum() * _RARE, side="right"))
    return order[: max(count, 1)]


def flatten_levels(levels: list[Level]) -> list[np.ndarray]:
    """The cluster of each row, for each level."""
    found = [levels[0].labels]
    for level in levels[1:]:
        found.append(level.labels[found[-1]])
    return found


def sample_rows(levels: list[Level], target: int, copies: int, generator: np.random.Generator) -> np.ndarray:
    """How often each row is drawn, int64 `[rows]`; in all `target`, or all there is if that is less."""
    clusters = flatten_levels(levels)
    quotas = split_target(np.bincount(clusters[-1], minlength=len(levels[-1].centroids)) * copies, target, generator)
    for below, level in zip(clusters[-2::-1], levels[:0:-1], strict=True):
        sizes = np.bincount(below, minlength=len(level.labels)) * copies
        quotas = _pass_down_quotas(quotas, level.labels, sizes, generator)
    return _members(clusters[0], quotas, generator)


def _pass_down_quotas(
    quotas: np.ndarray, parents: np.ndarray, sizes: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Each cluster's quota shared out among its children."""
    found = np.zeros(len(parents), dtype=np.int64)
    order = np.argsort(parents, kind="stable")
    borders = np.searchsorted(parents[order], np.arange(len(quotas) + 1))
    for parent, quota in enumerate(quotas):
        children = order[borders[parent] : borders[parent + 1]]
        found[children] = split_target(sizes[children], int(quota), generator)
    return found


def split_target(sizes: np.ndarray, target: int, generator: np.random.Generator) -> np.ndarray:
    """How many to take of groups of some sizes, int64: all of the small ones, of the others equally many.

    The sum is `target` exactly, or that of the sizes if it is less; what equal shares leave over goes, one each, to
    random groups that have more.
    """
    target = min(target, int(sizes.sum()))
    low, high = 0, int(sizes.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(sizes, middle).sum() <= target:
            low = middle
        else:
            high = middle - 1
    taken = np.minimum(sizes, low).astype(np.int64)
    more = np.flatnonzero(sizes > low)
    taken[generator.permutation(more)[: target - int(taken.sum())]] += 1
    return taken


def _members(labels: np.ndarray, quotas: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """How often each row is drawn: each of a cluster as often as the next, and random ones once more."""
    order = np.lexsort((generator.permutation(len(labels)), labels))
    sizes = np.bincount(labels, minlength=len(quotas))
    whole, rest = np.divmod(quotas, np.maximum(sizes, 1))
    drawn = np.empty(len(labels), dtype=np.int64)
    drawn[order] = whole[labels[order]] + (rank_within(labels[order]) < rest[labels[order]])
    return drawn


def evenness(counts: np.ndarray) -> dict[str, float]:
    """How evenly things are spread over groups: Gini coefficient (0 even), entropy over its highest value (1 even),
    and the effective number of groups, exp(entropy)."""
    shares_ = np.sort(counts) / max(counts.sum(), 1)
    n = len(counts)
    gini = float(((2 * np.arange(1, n + 1) - n - 1) * shares_).sum() / n)
    there = shares_[shares_ > 0]
    entropy = float(-(there * np.log(there)).sum())
    most = float(np.log(n)) if n > 1 else 1.0
    return {"gini": round(gini, 4), "entropy": round(entropy / most, 4), "effective": round(float(np.exp(entropy)), 1)}
