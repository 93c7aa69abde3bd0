"""Types and values of settings in words a user knows."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from .errors import ConfigError
from .yaml_dialect import Dumper


def members(kind: Any) -> tuple[Any, ...]:
    """``int | None`` as (int, None); any other type as itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)


def type_name(kind: Any) -> str:
    """A type in words a user knows."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    names = []
    for member in members(kind):
        if typing.get_origin(member) is typing.Literal:
            names.append("one of " + ", ".join(str(value) for value in typing.get_args(member)))
        elif typing.get_origin(member) is list:
            item = {int: "whole numbers", float: "numbers", str: "texts"}[typing.get_args(member)[0]]
            names.append(f"a list of {item}")
        else:
            names.append(words[member])
    return " or ".join(names)


def typed(key: str, value: Any, kind: Any, origin: str = "") -> Any:
    """The value in its declared type; whole numbers may stand for numbers, nothing else is converted."""
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        place = "".join(f"[{i}]" for i in error.errors()[0]["loc"] if isinstance(i, int))
        where = f"{origin}: " if origin else ""
        example = " Write a list as [a, b]." if typing.get_origin(kind) is list and not isinstance(value, list) else ""
        raise ConfigError(
            f"{where}{key}{place} must be {type_name(kind)}; got {value!r} ({type(value).__name__}).{example}"
        ) from error


def fields_of(cls: type) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(cls)}


def nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def default_of(setting: Field[Any]) -> Any:
    return setting.default_factory() if setting.default_factory is not MISSING else setting.default


def as_yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
