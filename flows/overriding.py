"""Flags below named entries of a file: `--students.small.lr 0.5` changes one key of one student, not all students."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel


def merged(
    tokens: Sequence[str], content: Mapping[str, Any], model: type[BaseModel]
) -> tuple[list[str], dict[str, Any]]:
    """Move flags that change what a file says of a named entry into the file's content.

    The command line's parser takes such an entry, and with it all that stand beside it, from the flags alone.

    Returns:
        The tokens that are left, and the content.
    """
    names = [path for path in _named(model) if _at(content, path) is not None]
    left: list[str] = []
    changed = copy.deepcopy(dict(content))
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        flag, given, value = token.partition("=")
        path = next((each for each in names if flag.startswith(f"--{'.'.join(each)}.")), None)
        if path is None:
            left.append(token)
            continue
        values = [value] if given else _values(rest)
        name, *keys = flag.removeprefix(f"--{'.'.join(path)}.").split(".")
        _put(changed, [*path, name, *(key.replace("-", "_") for key in keys)], values)
    return left, changed


def _values(rest: list[str]) -> list[str]:
    """The words up to the next flag, taken from what is left."""
    found = []
    while rest and not rest[0].startswith("--"):
        found.append(rest.pop(0))
    return found


def _put(content: dict[str, Any], path: Sequence[str], values: Sequence[str]) -> None:
    *parents, last = path
    for key in parents:
        inner = content.get(key)
        content[key] = inner if isinstance(inner, dict) else {}
        content = content[key]
    plain = [None if each.lower() in ("null", "none") else each for each in values]
    content[last] = True if not plain else plain[0] if len(plain) == 1 else plain


def _at(content: Any, path: Sequence[str]) -> Any:
    for key in path:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else None


def _named(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Paths of the keys whose values are entries by name."""
    for name, field in model.model_fields.items():
        if get_origin(field.annotation) is dict:
            yield (name,)
        for inner in _models(field.annotation):
            yield from ((name, *path) for path in _named(inner))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) is not dict:
        for each in get_args(annotation):
            yield from _models(each)
