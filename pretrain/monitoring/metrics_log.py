"""What a training says of itself: one row a step, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from infra.storage import filesystem
from pretrain.monitoring import collapse

METRICS = "metrics.jsonl"
SKIPPED = "skipped"
"""Key of the rows of skipped steps, whose losses may be missing."""
_FACTS = ("step", "samples", "lr", "momentum", "gradient_norm", SKIPPED)
BAD_SAMPLE_PREFIX = "bad_samples_"
PROBE_PREFIX = "probe_"
_OTHER = (BAD_SAMPLE_PREFIX, PROBE_PREFIX, collapse.PREFIX)


def select_losses(row: Mapping[str, float]) -> dict[str, float]:
    """The loss and its terms in a row."""
    return {name: value for name, value in row.items() if name not in _FACTS and not name.startswith(_OTHER)}


def parse_rows(text: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in text.splitlines()]


def filter_file(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave out of a file of JSON lines, if it is there, what a killed attempt wrote too much, half a line included."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and keep(json.loads(line))]
        filesystem.write_atomic(str(path), "".join(kept).encode())


def write_rows(path: Path, rows: Iterable[Mapping[str, float]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
