"""Typed configuration: one pydantic model per stage, read from YAML, unknown keys rejected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from infra.errors import UserError

_LONGEST_VALUE = 60  # characters of a wrong value that a message repeats


class Config(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_siblings(cls, values: Any) -> Any:
        """A mapping for a nested model changes the keys that it names; the others stay as the field's default has them,
        not as the nested model's own defaults."""
        if not isinstance(values, dict):
            return values
        completed = {}
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True) if isinstance(values.get(name), dict) else None
            if isinstance(default, Config):
                completed[name] = default.completed(values[name])
        return values | completed if completed else values

    def completed(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keys that are given, and of the others those that were set when this model was made.

        Of another `kind` than this model's, the keys that are given are all.
        """
        kind = getattr(self, "kind", None)
        if kind is not None and given.get("kind", kind) != kind:
            return dict(given)
        kept = {name: getattr(self, name) for name in self.model_fields_set if name not in given}
        for name, value in given.items():
            inner = getattr(self, name, None)
            if isinstance(inner, Config) and isinstance(value, dict):
                kept[name] = inner.completed(value)
        return {**({} if kind is None else {"kind": kind}), **given, **kept}

    def settings(self) -> dict[str, Any]:
        """The resolved values as plain JSON types."""
        return self.model_dump(mode="json")


class Output(Config):
    """Where a stage writes its artifact."""

    out: str
    """URL of the artifact; {id} stands for its id."""
    restart: bool = False
    """Discard unfinished work of other settings at `out`. Work of the same settings is always resumed."""


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys, as the specification does: the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """The content of a YAML document without duplicate keys.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, _UniqueKeys)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping from a local file.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a YAML file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; give the path of a YAML file, or the folder by a flag (--source)") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; give the path of a YAML file") from None
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        problem = str(getattr(error, "problem", None) or "syntax error")
        remedy = "indent with spaces" if "'\\t'" in problem else "fix the syntax"
        raise UserError(f"{path}{line}: not valid YAML: {problem}; {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no mapping of keys to values; see flows/pipelines for examples")
    return content


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """Put the first problem of a validation error into one line, with the number of others."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] == "missing")
    first = problems[0]
    key = ".".join(str(part) for part in _without_tags(first["loc"], model))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {_remedy(first, model)}{more}" if key else f"{_remedy(first, model)}{more}"


def _without_tags(location: tuple[int | str, ...], model: type[BaseModel]) -> list[int | str]:
    """A problem's place by the keys of a file: without the names of members of unions that pydantic puts between."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    nodes, kept = [schema], list[int | str]()
    for part in location:
        if not any(part in node.get("discriminator", {}).get("mapping", {}) for node in nodes):
            kept.append(part)
        nodes = [child for node in nodes for child in _children(node, part, definitions)]
    return kept


def _remedy(problem: ErrorDetails, model: type[BaseModel]) -> str:
    kind = problem["type"]
    if kind == "extra_forbidden":
        allowed = ", ".join(sorted(_keys_beside(problem["loc"], model)))
        return f"unknown key; allowed here: {allowed}" if allowed else "unknown key; remove it"
    if kind == "missing":
        return "required; add it"
    if kind == "union_tag_not_found":
        return f"kind is required; give one of {_kinds(problem['loc'], model)}"
    if kind == "union_tag_invalid":
        context = problem.get("ctx", {})
        return f"no kind {context.get('tag')!r}; give one of {context.get('expected_tags', '').replace(chr(39), '')}"
    message = problem["msg"].removeprefix("Value error, ")
    message = f"{message[:1].lower()}{message[1:]}"
    if kind == "value_error":  # raised here, in words that name the values
        return message
    given = problem["input"]
    return message if isinstance(given, Mapping | BaseModel) else f"{message}, got {_shortened(given)}"


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def _kinds(location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """The kinds that a union allows, by the model's schema."""
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    nodes = [schema]
    for part in location:
        nodes = [child for node in nodes for child in _children(node, part, definitions)]
    return ", ".join(name for node in nodes for name in node.get("discriminator", {}).get("mapping", {}))


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
