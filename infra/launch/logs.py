"""Show what is written to log files while it is written."""

from __future__ import annotations

import sys
from pathlib import Path


class Tail:
    """The lines that are appended to a folder's files from now on, each behind its file's name.

    Args:
        pattern: which files.
    """

    def __init__(self, folder: Path, pattern: str) -> None:
        self.folder, self.pattern = folder, pattern
        self._shown = {path: path.stat().st_size for path in folder.glob(pattern)}

    def show(self, to_the_end: bool = False) -> None:
        """Print whole lines that have come since; `to_the_end`: also a last one that is not ended."""
        for path in sorted(self.folder.glob(self.pattern)):
            with path.open("rb") as file:
                file.seek(self._shown.get(path, 0))
                text = file.read()
            whole = text if to_the_end else text[: text.rfind(b"\n") + 1]
            self._shown[path] = self._shown.get(path, 0) + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                print(f"[{path.stem}] {line}", file=sys.stderr, flush=True)
