"""Flags to settings: `--a.b.c VALUE` has the meaning of the key c below a.b in a YAML file."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel

from flows.cli.schema import Key, annotation_at, is_optional, keys, leaves, models, nested, options
from infra.config import Config, parse_yaml
from infra.errors import UserError

_TRUE, _FALSE, _NULL = ("true", "yes", "on"), ("false", "no", "off"), ("null", "~")


def apply_flags(
    command: str, tokens: Sequence[str], content: Mapping[str, Any], model: type[BaseModel]
) -> dict[str, Any]:
    """The content of a file with flags put over it: a flag changes one key and leaves those beside it.

    Args:
        command: the command's name, for messages.
        tokens: flags and their values.
        content: of the file, whose own content stays as it is.

    Raises:
        UserError: a flag is unknown, lacks its value, or is followed by a word that belongs to nothing.
    """
    changed = copy.deepcopy(dict(content))
    rest, seen = list(tokens), set[tuple[str, ...]]()
    while rest:
        token = rest.pop(0)
        flag, equals, value = token.partition("=")
        if not flag.startswith("--"):
            raise _stray_word_error(command, token)
        words = [value] if equals else _words(rest)
        given = flag.removeprefix("--").split(".")
        found = annotation_at(model, given, changed)
        if found is None and flag.startswith("--no-"):
            found = annotation_at(model, flag.removeprefix("--no-").split("."), changed)
            if found is None or bool not in options(found[1]):
                raise _unknown_flag_error(command, flag, model)
            if equals or words:
                raise UserError(f"{flag}: takes no value; leave {words[0]} out")
            words = ["false"]
        if found is None:
            raise _unknown_flag_error(command, flag, model)
        path, annotation = found
        if tuple(path) in seen:
            raise UserError(f"{flag}: given twice; give it once, with all its values behind it if it takes several")
        seen.add(tuple(path))
        used = _count(words, annotation, bool(equals))
        if used < len(words):
            raise _stray_word_error(command, words[used])
        _put(changed, path, _value(flag, words, annotation), model)
    return changed


def _words(rest: list[str]) -> list[str]:
    """The words up to the next flag, taken from what is left."""
    words = []
    while rest and not rest[0].startswith("--"):
        words.append(rest.pop(0))
    return words


def _stray_word_error(command: str, word: str) -> UserError:
    return UserError(f"{word}: belongs to no flag; give a file, recipe or model right after fovea {command}")


def _unknown_flag_error(command: str, flag: str, model: type[BaseModel]) -> UserError:
    known = [each.flag for each in _all_keys(model)]
    near = difflib.get_close_matches(flag, known, 1, 0.6)
    hint = f"Did you mean {near[0]}? " if near else ""
    return UserError(f"{flag}: unknown flag. {hint}fovea {command} --help-all lists all")


def _all_keys(model: type[BaseModel]) -> list[Key]:
    found = []
    level = list(keys(model))
    while level:
        found += level
        level = [each for key in level if models(key.annotation) for each in nested(key)]
    return found


def _count(words: Sequence[str], annotation: Any, is_joined: bool) -> int:
    """How many of the words behind a flag are its value."""
    if _takes_several(annotation) and not is_joined:
        return len(words)
    if bool in options(annotation) and words and words[0].lower() not in (*_TRUE, *_FALSE, *_NULL):
        return 0
    return min(len(words), 1)


def _takes_several(annotation: Any) -> bool:
    return any(get_origin(each) in (list, tuple) for each in options(annotation))


def _value(flag: str, words: Sequence[str], annotation: Any) -> Any:
    """What words mean, for a key of some type: what the same text means in YAML."""
    kinds = options(annotation)
    if not words:
        if bool in kinds:
            return True
        raise UserError(f"{flag}: needs a value")
    if len(words) == 1 and is_optional(annotation) and words[0].lower() in _NULL:
        return None
    sequence = next((each for each in kinds if get_origin(each) in (list, tuple)), None)
    if sequence is not None and not (len(words) == 1 and (words[0].startswith("[") or str in kinds)):
        return [_value(flag, [word], _item(sequence, place)) for place, word in enumerate(words)]
    if sequence is None and _is_plain_text(kinds):
        return words[0]
    if bool in kinds and words[0].lower() in (*_TRUE, *_FALSE):
        return words[0].lower() in _TRUE
    return _as_yaml(flag, words[0])


def _item(sequence: Any, place: int) -> Any:
    items = get_args(sequence) or (Any,)
    return items[0] if get_origin(sequence) is list else items[min(place, len(items) - 1)]


def _is_plain_text(kinds: Sequence[Any]) -> bool:
    """Whether a value of these types is taken as it is: text, and numbers, which are checked later."""
    return all(
        each in (str, int, float)
        or (get_origin(each) is Literal and all(isinstance(value, str) for value in get_args(each)))
        for each in kinds
    )


def _as_yaml(flag: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"{flag}: {text!r} is not valid YAML; quote it, such as '{{kind: exact}}'") from None


def _put(content: Any, path: Sequence[str], value: Any, model: type[BaseModel]) -> None:
    """Set a key at any depth; a list that is not given yet is that of the defaults."""
    for depth, part in enumerate(path[:-1]):
        inner = _get(content, part)
        if path[depth + 1].isdecimal() and not isinstance(inner, list):
            inner = _default_items(model, path[: depth + 1])
        elif not isinstance(inner, dict | list):
            inner = {}
        _set(content, part, inner)
        content = inner
    _set(content, path[-1], value)


def _get(content: Any, part: str) -> Any:
    if isinstance(content, list):
        return content[int(part)] if int(part) < len(content) else None
    return content.get(part)


def _set(content: Any, part: str, value: Any) -> None:
    if not isinstance(content, list):
        content[part] = value
    elif int(part) < len(content):
        content[int(part)] = value
    elif int(part) == len(content):
        content.append(value)
    else:
        raise UserError(f"{part}: there are {len(content)} items, counted from 0")


def _default_items(model: type[BaseModel], path: Sequence[str]) -> list[Any]:
    """The items of a list as they are where nothing is given."""
    for key in leaves(model):
        if key.path == tuple(path) and isinstance(key.default, list):
            return [each.model_dump(mode="json") if isinstance(each, Config) else each for each in key.default]
    return []
