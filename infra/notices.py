"""Lines on standard error that say what a command is doing before its progress bar, or what it waits for."""

from __future__ import annotations

import os
import sys


def print_notice(line: str) -> None:
    """Print a line on standard error; of several ranks of a training the first one does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def print_loading(title: str, module: str) -> None:
    """Say that a module is about to be imported, which can take a minute on a busy machine, unless it is imported."""
    if module not in sys.modules:
        print_notice(f"{title}: loading {module}")
