"""Typed configuration: one pydantic model per stage, read from YAML, unknown keys rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from infra.errors import UserError


class Config(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def settings(self) -> dict[str, Any]:
        """The resolved values as plain JSON types."""
        return self.model_dump(mode="json")


class Output(Config):
    """Where a stage writes its artifact."""

    out: str
    """URL of the artifact; {id} stands for its id."""
    restart: bool = False
    """Discard unfinished work of other settings at `out`. Work of the same settings is always resumed."""


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping from a local file.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a YAML file") from None
    except (IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"{path}: not a text file; give the path of a YAML file") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise UserError(f"{path}{line}: not valid YAML; mend the syntax") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no mapping of keys to values; see flows/pipelines for examples")
    return content


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Put the first problem of a validation error into one line, with the number of others."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] == "missing")
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"]) or model.__name__
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {_remedy(first, model)}{more}"


def _remedy(problem: ErrorDetails, model: type[BaseModel]) -> str:
    if problem["type"] == "extra_forbidden":
        allowed = ", ".join(sorted(_keys_beside(problem["loc"], model)))
        return f"unknown key; allowed here: {allowed}" if allowed else "unknown key; remove it"
    if problem["type"] == "missing":
        return "required; add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{message[:1].lower()}{message[1:]}, got {problem['input']!r}"


def _keys_beside(location: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    """The keys allowed where an unknown one was found, following nested models by their schema."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    nodes = [schema]
    for part in location[:-1]:
        nodes = [child for node in nodes for child in _children(node, part, definitions)]
    return [key for node in nodes for key in node.get("properties", {})]


def _children(node: dict[str, Any], part: int | str, definitions: dict[str, Any]) -> list[dict[str, Any]]:
    if isinstance(part, int):
        found = node.get("items", {})
    else:
        found = node.get("properties", {}).get(part) or node.get("additionalProperties")
        if not isinstance(found, dict):  # the tag of a union: pick the member it names
            tagged = node.get("discriminator", {}).get("mapping", {}).get(part)
            return [definitions[tagged.rsplit("/", 1)[-1]]] if tagged else [node]
    return list(_resolve(found, definitions))


def _resolve(node: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in node:
        return _resolve(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
    if "discriminator" in node:
        return [node]
    if "anyOf" in node:
        return [leaf for option in node["anyOf"] for leaf in _resolve(option, definitions)]
    return [node]
