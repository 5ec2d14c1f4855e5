"""Near-duplicates: connected components of the similarity graph, one representative each (DINOv2, appendix A)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from curation.context import Context
from curation.similarity.exact import widen
from curation.similarity.nearest import similarities
from curation.steps.config import NearDuplicates
from curation.steps.representative import first_of_each, order_by_preference
from curation.steps.similarity_join import similarity_join
from infra.compute.sharded_array import ShardedArray
from infra.errors import UserError

_WORST = 10  # components that the manifest tells of
_LONG_CHAIN = 50  # images
_UNLIKE = 0.1  # below the threshold
_SAMPLED = 2048  # members of a component that are compared with each other to tell its diameter


def near_duplicates(context: Context, step: NearDuplicates) -> Mapping[str, Any]:
    """Keep one image of each component; it stands for all of them."""
    threshold = step.threshold
    assert threshold is not None, "resolved before the steps run"
    found = similarity_join(context, step, threshold)
    members = np.flatnonzero(np.bincount(found.labels)[found.labels] > 1)
    order = order_by_preference(context, step, found.rows[members], found.labels[members])
    rows, labels = found.rows[members][order], found.labels[members][order]
    winners, scores = choose_representatives(context.vectors, rows, labels, step.min_similarity_to_representative)
    if not step.allow_chains and step.min_similarity_to_representative <= -1:
        _require_no_chains(context, labels, scores, threshold)
    losers = rows != winners
    context.state.merge(rows[losers], winners[losers], step.kind, "near_duplicate", scores[losers])
    told = found.facts(threshold)
    return {
        "dropped": int(losers.sum()),
        "groups_split_off": int((~losers).sum()) - told["components"],
        **told,
        "worst": _worst(context, rows, labels, scores),
    }


def _require_no_chains(context: Context, labels: np.ndarray, scores: np.ndarray, threshold: float) -> None:
    """Check that large components are copies of one image, and not chains of images that are each like the next.

    Raises:
        UserError: one is a chain.
    """
    sizes = np.bincount(labels)
    unlike = np.bincount(labels, scores < threshold - _UNLIKE, len(sizes))
    chains = np.flatnonzero((sizes >= _LONG_CHAIN) & (unlike > sizes / 2))
    if len(chains):
        largest = chains[np.argmax(sizes[chains])]
        raise UserError(
            f"near_duplicates: {sizes[largest]:,} of {len(context.corpus):,} images form one chain: "
            f"{int(unlike[largest]):,} are less similar than {threshold - _UNLIKE:.2f} to the image that stays. "
            f"The threshold {threshold:g} is too low for this backbone; raise it, set "
            "min_similarity_to_representative, or set allow_chains"
        )


def choose_representatives(
    vectors: ShardedArray, rows: np.ndarray, labels: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Who stands for each row, and how similar it is, exactly.

    Of a component the first row stands for all that are at least so similar to it, of the others again the first, and
    so on.

    Args:
        rows: the preferred ones first.
        labels: component of each.
    """
    winners, scores = rows.copy(), np.ones(len(rows), dtype=np.float32)
    left = np.arange(len(rows))
    while len(left):
        best = left[first_of_each(labels[left])]
        similar = similarities(vectors, rows[left], rows[best])
        near = (similar >= least) | (best == left) | (least <= -1)
        winners[left[near]], scores[left[near]] = rows[best[near]], similar[near]
        left = left[~near]
    return winners, scores


def _worst(context: Context, rows: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> list[dict[str, Any]]:
    """The components with members least like what stands for them: where chains are to be looked for."""
    order = np.lexsort((context.state.ranks[rows], scores))
    _, first = np.unique(labels[order], return_index=True)
    told = []
    for place in order[np.sort(first)[:_WORST]]:
        members = np.sort(rows[labels == labels[place]])
        told.append(
            {
                "key": context.state.keys[int(rows[place])].as_py(),
                "images": len(members),
                "to_representative": round(float(scores[place]), 4),
                "diameter": round(_least_similar(context.vectors, members), 4),
            }
        )
    return told


def _least_similar(vectors: ShardedArray, members: np.ndarray) -> float:
    """The lowest similarity within a component: its diameter, as a cosine; of a large one that of a sample."""
    chosen = members[np.unique(np.linspace(0, len(members) - 1, _SAMPLED).astype(np.int64))]
    wide = widen(vectors.take(chosen))
    return float((wide @ wide.T).min())
