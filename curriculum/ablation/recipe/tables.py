"""Conversion between TOML or JSON tables and frozen dataclasses.

Contract: `build` refuses an unknown key (and suggests the nearest one), a missing required key, and a value of the wrong type.
The dataclass itself checks what the values mean. `plain` is the inverse: `build` accepts its result.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from sparsort.errors import SparsortError, did_you_mean, unknown_choice

T = TypeVar("T")
# What `_convert` returns for a value of the wrong type. It is not None, because None is a valid value of optional fields.
_MISMATCH = object()
_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    Path: "a path",
    type(None): "nothing",
}


def read(path: Path) -> dict[str, Any]:
    """The contents of a TOML file.

    Raises:
        SparsortError: it is missing, not UTF-8 or not TOML, or exceeds Python's limits (deep nesting, huge numbers).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SparsortError(f"cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise SparsortError(f"{path} is not valid UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise SparsortError(f"{path} is not valid TOML: {error}.") from error
    except (ValueError, RecursionError) as error:
        # Python raises these two errors itself, and `tomllib` does not turn them into a TOMLDecodeError.
        raise SparsortError(f"{path} contains a number with too many digits, or is nested too deeply.") from error


def build(cls: type[T], table: Mapping[str, Any], *, kind: str, where: str) -> T:
    """Create an object of the dataclass `cls` from a table.

    Args:
        cls: a keyword-only dataclass whose annotations consist of text, numbers, paths, literals, tuples, mappings to text, and
            dataclasses. A list in the table becomes a tuple.
        table: key to value, as read from TOML or JSON.
        kind: a noun for the object in error messages ("task", "ablation").
        where: the origin of the table in error messages.

    Raises:
        SparsortError: a key is unknown or missing, or a value has the wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in fields:
            hint = did_you_mean(key, fields)
            raise SparsortError(f"{where}: there is no {key!r} in {_a(kind)}.{hint} There is: {', '.join(fields)}.")
    for name, field in fields.items():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in table and not has_default:
            raise SparsortError(f"{where}: the {kind} has no {name!r}, which it needs. Add: {name} = …")
    values = {key: _checked(key, given, hints[key], where) for key, given in table.items()}
    return cls(**values)


def coerce(instance: Any, where: str) -> None:
    """Check the types of a frozen dataclass's fields, in its `__post_init__`. Lists become tuples.

    Raises:
        SparsortError: a value has the wrong type.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = _checked(field.name, getattr(instance, field.name), hints[field.name], where)
        # A frozen dataclass can be changed only like this, even by its own `__post_init__`.
        object.__setattr__(instance, field.name, value)


def plain(value: Any) -> Any:
    """Convert dataclasses, tuples and paths into the types that JSON and TOML have."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _checked(name: str, given: Any, hint: Any, where: str) -> Any:
    value = _convert(given, hint)
    if value is not _MISMATCH:
        return value
    if typing.get_origin(hint) is Literal and isinstance(given, str):
        raise unknown_choice(name, given, map(str, typing.get_args(hint)))
    raise SparsortError(f"{where}: {name} is {given!r}, but {_expected(hint)} is expected.")


def _convert(given: Any, hint: Any) -> Any:
    """`given` converted to the annotated type, or `_MISMATCH`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        converted = (_convert(given, option) for option in arguments)
        return next((value for value in converted if value is not _MISMATCH), _MISMATCH)
    if origin is Literal:
        # Comparing types too keeps True from matching 1.
        return given if any(given == choice and type(given) is type(choice) for choice in arguments) else _MISMATCH
    if origin is tuple:
        if not isinstance(given, (list, tuple)):
            return _MISMATCH
        items = [_convert(item, arguments[0]) for item in given]
        return _MISMATCH if any(item is _MISMATCH for item in items) else tuple(items)
    if origin is not None:
        # The only other generic annotation is a mapping whose values are text.
        is_text = isinstance(given, Mapping) and all(isinstance(value, str) for value in given.values())
        return {str(key): value for key, value in given.items()} if is_text else _MISMATCH
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(given, hint):
            return given
        name = hint.__name__.lower()
        return (
            build(hint, given, kind=name, where=f"{_a(name)} in a table") if isinstance(given, Mapping) else _MISMATCH
        )
    if hint is Path:
        return Path(given) if isinstance(given, (str, Path)) else _MISMATCH
    if hint is float:
        # `float` raises OverflowError for an integer beyond its range.
        return float(given) if type(given) is float or (type(given) is int and abs(given) < 2**1024) else _MISMATCH
    return given if type(given) is hint else _MISMATCH


def _expected(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(option) for option in arguments if option is not type(None))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list (of {_expected(arguments[0])})"
    if origin is not None:
        return "a table of texts"
    return _NAMES.get(hint, f"{_a(getattr(hint, '__name__', str(hint)).lower())}'s table")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
