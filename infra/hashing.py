"""Content hashes: of bytes, of files, of settings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from infra.storage import filesystem

_CHUNK = 1 << 20


def hash_file(path: Path) -> str:
    """SHA-256 of a local file, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_url(url: str) -> tuple[int, str]:
    """Size in bytes and SHA-256 of the file at a URL, read once in pieces."""
    if filesystem.is_local(url):
        path = filesystem.local_path(url)
        with filesystem.readable_errors(url):
            return path.stat().st_size, hash_file(path)
    digest, size = hashlib.sha256(), 0
    with filesystem.open_read(url) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a value's canonical JSON: independent of key order and of the process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
