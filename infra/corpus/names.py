"""Names of samples and their files: which can be stored, and how they split into key and extension."""

from __future__ import annotations

import posixpath
import re

_CONTROL_OR_SURROGATE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NO_EXTENSION = "bin"


def is_storable(name: str) -> bool:
    """Whether a name can stand in an index, a tar and a path of any system: a relative path of UTF-8 without control
    characters that stays below its base."""
    if not name or _CONTROL_OR_SURROGATE.search(name):
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))


def escape_name(name: str) -> str:
    """A name as it can be shown and stored: bytes that are no text are written as escapes."""
    return name.encode(errors="backslashreplace").decode()


def extension_of(name: str) -> str:
    """What follows the first dot of a member's base name, as in WebDataset; `bin` where there is none."""
    return posixpath.basename(name).partition(".")[2] or _NO_EXTENSION


def suffix_of(name: str) -> str:
    """What follows the last dot of a file's base name, in small letters, without underscores before it; `bin` where
    there is none."""
    return posixpath.splitext(name)[1].removeprefix(".").lstrip("_").lower() or _NO_EXTENSION
