"""Configuration models as trees of keys: what their flags, help pages and completions are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

REQUIRED = object()
"""In the place of a default: the key has to be given."""


@dataclass(frozen=True)
class Key:
    """One key of a configuration."""

    path: tuple[str, ...]
    annotation: Any
    description: str
    default: Any
    """As it is where nothing is given; `REQUIRED` where something must be."""
    kind: str | None = None
    """Of a key of one member of a union: the `kind` that has it."""

    @property
    def flag(self) -> str:
        return "--" + ".".join(part.replace("_", "-") for part in self.path)

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED


def options(annotation: Any) -> list[Any]:
    """The members of a union, at any depth, without None; of any other annotation that one."""
    if get_origin(annotation) is Annotated:
        return options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [leaf for each in get_args(annotation) for leaf in options(each)]
    return [] if annotation in (None, NoneType) else [annotation]


def is_optional(annotation: Any) -> bool:
    """Whether None is allowed."""
    if get_origin(annotation) is Annotated:
        return is_optional(get_args(annotation)[0])
    return get_origin(annotation) in (Union, UnionType) and any(
        each in (None, NoneType) for each in get_args(annotation)
    )


def models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value may be."""
    return [each for each in options(annotation) if isinstance(each, type) and issubclass(each, BaseModel)]


def item_models(annotation: Any) -> list[type[BaseModel]]:
    """The models that the items of a list may be."""
    return [
        each for option in options(annotation) if get_origin(option) is list for each in models(get_args(option)[0])
    ]


def kind_of(model: type[BaseModel]) -> str | None:
    """What tells a member of a union from the others."""
    field = model.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field is not None and get_origin(field.annotation) is Literal else None


def keys(
    model: type[BaseModel], default: Any = None, path: tuple[str, ...] = (), kind: str | None = None
) -> Iterator[Key]:
    """The keys of a model, one level of nesting behind the other.

    Args:
        default: an instance, whose values are the keys' defaults; otherwise those of the model are.
    """
    for name, field in model.model_fields.items():
        value = getattr(default, name) if isinstance(default, model) else _default(field)
        yield Key((*path, name), field.annotation, " ".join((field.description or "").split()), value, kind)


def nested(key: Key) -> Iterator[Key]:
    """The keys below a key whose value is a model, with the defaults that hold when some of them are given."""
    alternatives = models(key.annotation)
    for model in alternatives:
        fits = isinstance(key.default, model)
        kind = kind_of(model) if len(alternatives) > 1 else None
        yield from keys(model, key.default if fits else None, key.path, kind)


def leaves(model: type[BaseModel]) -> Iterator[Key]:
    """All keys at any depth whose values are no models, and those whose values are lists or mappings of models."""

    def below(key: Key) -> Iterator[Key]:
        if models(key.annotation):
            for each in nested(key):
                yield from below(each)
        else:
            yield key

    for key in keys(model):
        yield from below(key)


def _default(field: FieldInfo) -> Any:
    return REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def annotation_at(model: type[BaseModel], path: Sequence[str], content: Any) -> tuple[tuple[str, ...], Any] | None:
    """A key as the models spell it, and its annotation; None where there is no such key.

    Args:
        path: the key as it is given, perhaps with dashes for underscores.
        content: what is given beside it: the `kind` in it chooses among members of a union.
    """
    return _below(model, tuple(path), content)


def _below(annotation: Any, path: tuple[str, ...], content: Any) -> tuple[tuple[str, ...], Any] | None:
    if not path:
        return (), annotation
    head, rest = path[0], path[1:]
    for option in _by_kind(options(annotation), content):
        for name, inner in _steps(option, head):
            found = _below(inner, rest, _inside(content, name))
            if found is not None:
                return (name, *found[0]), found[1]
    return None


def _by_kind(members: list[Any], content: Any) -> list[Any]:
    """Members of a union, that of the given kind first."""
    kind = content.get("kind") if isinstance(content, Mapping) else None
    return sorted(
        members, key=lambda each: not (isinstance(each, type) and issubclass(each, BaseModel) and kind_of(each) == kind)
    )


def _steps(option: Any, head: str) -> Iterator[tuple[str, Any]]:
    """A name below an annotation, and what its value is."""
    if isinstance(option, type) and issubclass(option, BaseModel):
        name = head.replace("-", "_")
        if name in option.model_fields:
            yield name, option.model_fields[name].annotation
    elif get_origin(option) is dict:
        yield head, get_args(option)[1]
    elif get_origin(option) in (list, tuple) and head.isdecimal():
        items = get_args(option)
        yield head, items[0] if get_origin(option) is list else items[min(int(head), len(items) - 1)]


def _inside(content: Any, name: str) -> Any:
    if isinstance(content, Mapping):
        return content.get(name)
    return content[int(name)] if isinstance(content, list) and name.isdecimal() and int(name) < len(content) else None
