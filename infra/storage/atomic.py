"""Files that appear whole, and folders of things that can be made again, kept for a while."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_MONTH = 30 * 24 * 3600  # seconds


@contextmanager
def atomic_write(path: Path, mode: int = 0o600) -> Iterator[Path]:
    """A hidden file beside `path`, which takes its place when the block ends well: nobody sees a part of it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def cached_json(path: Path, make: Callable[[], T]) -> T:
    """The content of a JSON file, which is made where it is not there yet."""
    if path.exists():
        return json.loads(path.read_text())
    content = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content))
    return content


def prune_older_than(folder: Path, seconds: float = _MONTH) -> None:
    """Remove files and folders that were not used for some time, among them what processes left that died.

    Who has a file open or mapped keeps it. What another process renames or removes meanwhile is passed over.
    """
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - seconds:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
