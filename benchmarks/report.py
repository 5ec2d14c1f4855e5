"""Rows of a benchmark: printed as a table, written as JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measurement beside its peer. `ratio` is peer / ours where less is better: above 1 we are ahead."""

    name: str
    value: float
    unit: str
    peer: float | None = None
    ratio: float | None = None
    target: float | None = None

    @property
    def ok(self) -> bool:
        return self.target is None or (self.ratio is not None and self.ratio >= self.target)


def cpu_seconds(ours: Callable[[], object], peer: Callable[[], object], repeats: int = 5) -> tuple[float, float]:
    """Median CPU-seconds of both, run in turn after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for run, found in zip((ours, peer), times, strict=True):
            started = time.process_time()
            run()
            found.append(time.process_time() - started)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def compared(name: str, ours: float, peer: float, unit: str, target: float | None = None) -> Row:
    return Row(name, ours, unit, peer, peer / ours, target)


def main(title: str, measure: Callable[[], Sequence[Row]]) -> None:
    """The command line of a benchmark: measure, print the table, write the rows where `--json FILE` says."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    file = parser.parse_args().json
    rows = measure()
    table = Table("name", "value", "unit", "peer", "ratio", "target", "ok", title=title)
    for row in rows:
        numbers = [None if each is None else f"{each:.4g}" for each in (row.value, row.peer, row.ratio, row.target)]
        value, peer, ratio, target = (each or "" for each in numbers)
        table.add_row(row.name, value, row.unit, peer, ratio, target, "yes" if row.ok else "NO")
    Console().print(table)
    if file is not None:
        file.write_text(json.dumps([asdict(row) | {"ok": row.ok} for row in rows], indent=1))
