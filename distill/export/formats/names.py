"""Names of weights in other tools."""

from __future__ import annotations

from collections.abc import Mapping


def rename_keys(name: str, names: Mapping[str, str]) -> str:
    """A name with all parts replaced that it has."""
    for before, after in names.items():
        name = name.replace(before, after)
    return name
