"""Exact duplicates, by content hash."""

from __future__ import annotations

import numpy as np

from curation.verdicts import Verdicts


def exact(verdicts: Verdicts, sha256: np.ndarray) -> None:
    """Of the kept images with the same bytes, keep the one whose key comes first."""
    rows = verdicts.kept()
    rows = rows[np.argsort(verdicts.keys[rows].astype(str), kind="stable")]
    _, first, group = np.unique(sha256[rows].astype(str), return_index=True, return_inverse=True)
    winners = rows[first][group]
    losers = rows != winners
    verdicts.drop(
        rows[losers],
        "exact",
        "exact_duplicate",
        verdicts.keys[winners[losers]],
        np.ones(losers.sum(), dtype=np.float32),
    )
    np.add.at(verdicts.weight, winners[losers], verdicts.weight[rows[losers]])
    verdicts.cluster[rows] = winners
