"""Folders of things that can be made again, kept for a while."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path

_MONTH = 30 * 24 * 3600  # seconds


def remove_unused(folder: Path) -> None:
    """Remove files and folders that were not used for a month, among them what processes left that died.

    Who has a file open or mapped keeps it. What another process renames or removes meanwhile is passed over.
    """
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _MONTH:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
