"""Curation against known truth: precision and recall of each step."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra.corpus.selection import Selection
from infra.errors import UserError

Ledger = list[dict[str, Any]]
_DUPLICATES = ("exact_duplicate", "near_duplicate")


def score_synthetic(url: str, truth_file: Path) -> dict[str, dict[str, float]]:
    """Score the last selection over the synthetic corpus: `dedup`, `decontamination` and, if it ran, `retrieval`."""
    truth = json.loads(truth_file.read_text())
    ledger = Selection.open(url).ledger.to_pylist()
    scores = {"dedup": _duplicates(ledger, truth), "decontamination": _leaks(ledger, truth)}
    if any(row["reason"] == "not_retrieved" for row in ledger):
        scores["retrieval"] = _retrieval(ledger, truth)
    return scores


def _duplicates(ledger: Ledger, truth: Mapping[str, Any]) -> dict[str, float]:
    """A removal is right if it lost against a copy of itself; all but one of each group should go."""
    removed = [row for row in ledger if row["reason"] in _DUPLICATES]
    right = sum(truth[row["key"]]["group"] == truth[row["matched_key"]]["group"] for row in removed)
    groups = Counter(truth[row["key"]]["group"] for row in ledger)
    return _precision_recall(right, len(removed), sum(groups.values()) - len(groups))


def _leaks(ledger: Ledger, truth: Mapping[str, Any]) -> dict[str, float]:
    """Of the leaks that deduplication left, which were found."""
    candidates = [row for row in ledger if row["reason"] not in _DUPLICATES]
    found = [row for row in candidates if row["reason"] == "leak"]
    right = sum(truth[row["key"]]["leak"] for row in found)
    return _precision_recall(right, len(found), sum(truth[row["key"]]["leak"] for row in candidates))


def _retrieval(ledger: Ledger, truth: Mapping[str, Any]) -> dict[str, float]:
    """Photographs should be kept, junk should not."""
    candidates = [row for row in ledger if row["keep"] or row["reason"] == "not_retrieved"]
    kept = [row for row in candidates if row["keep"]]
    right = sum(truth[row["key"]]["kind"] == "photo" for row in kept)
    return _precision_recall(right, len(kept), sum(truth[row["key"]]["kind"] == "photo" for row in candidates))


def _precision_recall(right: int, found: int, there: int) -> dict[str, float]:
    return {"precision": right / found if found else 1.0, "recall": right / there if there else 1.0}


def score_known_leaks(url: str, table: Path, column: str) -> dict[str, float]:
    """The share of listed keys that a selection dropped as leaks or as duplicates.

    Args:
        table: a CSV file with one leak of the pool a line.
        column: the column that holds the pool's key.

    Raises:
        UserError: the file or the column is missing, or none of its keys is in the selection.
    """
    if not table.is_file():
        raise UserError(f"{table}: no such file; fix known_leaks.table")
    with table.open(newline="") as file:
        reader = csv.DictReader(file)
        if column not in (reader.fieldnames or []):
            raise UserError(f"{table}: has no column {column}; it has {', '.join(reader.fieldnames or [])}")
        listed = {row[column] for row in reader}
    reasons = {row["key"]: row["reason"] for row in Selection.open(url).ledger.to_pylist() if row["key"] in listed}
    if not reasons:
        raise UserError(f"{table}: lists no key of {url}; is it the right table?")
    counts = Counter(reasons.values())
    gone = counts["leak"] + sum(counts[reason] for reason in _DUPLICATES)
    return {"listed": float(len(reasons)), "recall": gone / len(reasons), "as_leak": counts["leak"] / len(reasons)}
