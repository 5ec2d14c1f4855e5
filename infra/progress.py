"""Progress bars on standard error: live on a terminal, elsewhere a line a minute and one at the end of a stage."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[..., None]
_LINE_SECONDS = 60  # between lines in a log file


def _left(seconds: float, made: int, all_of_it: int) -> timedelta:
    """Time until the end at the speed so far."""
    return timedelta(seconds=round(seconds / max(made, 1) * max(all_of_it - made, 0)))


@contextlib.contextmanager
def progress(title: str, total: int | None, done: int = 0, shown: bool = True) -> Iterator[Advance]:
    """Show the progress of one stage.

    Yields a function `advance(count=1, note="")`; the note (losses, say) stands behind the bar. Of several ranks only
    one should have it `shown`.
    """
    console = Console(file=sys.stderr)
    lines = shown and not console.is_terminal
    started = time.monotonic()
    bar = Progress(
        TextColumn("[bold]{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        disable=not (console.is_terminal and shown),
    )
    completed = done
    last_note = ""
    last_line = started

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal completed, last_note, last_line
        completed += count
        last_note = note or last_note
        bar.update(task, advance=count, note=last_note)
        if lines and time.monotonic() - last_line > _LINE_SECONDS:
            last_line = time.monotonic()
            of = (
                ""
                if total is None
                else f" of {total}, {_left(last_line - started, completed - done, total - done)} left,"
            )
            print(f"{title}: {completed}{of} {last_note}".rstrip(), file=sys.stderr, flush=True)

    with bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield advance
    if lines:
        seconds = time.monotonic() - started
        print(f"{title}: {completed} in {seconds:.1f} s {last_note}".rstrip(), file=sys.stderr, flush=True)
