"""Files that say what is right, checked when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from infra.config import parse_yaml
from infra.errors import UserError

T = TypeVar("T")


def read_json(path: str, kind: type[T]) -> T:
    """What a JSON file holds.

    Raises:
        UserError: it is missing, or holds something else.
    """
    try:
        return TypeAdapter(kind).validate_python(_parsed(path, json.loads))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {place}: {first['msg'].lower()}; see docs/evaluation.md") from None


def read_class_names(path: str) -> dict[str, Any] | list[Any]:
    """A mapping or a list from a YAML or JSON file; keys as text, for a class may be called 7.

    Raises:
        UserError: it is missing, or holds neither.
    """
    content = _parsed(path, parse_yaml)
    if isinstance(content, dict):
        return {str(key): value for key, value in content.items()}
    if not isinstance(content, list):
        raise UserError(f"{path}: holds neither a mapping nor a list; see docs/evaluation.md")
    return content


def _parsed(path: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of the file") from None
    except (ValueError, yaml.YAMLError):  # of JSON and of what is no UTF-8, and of YAML
        raise UserError(f"{path}: cannot be read; fix its syntax") from None
