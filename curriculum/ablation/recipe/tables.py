"""TOML tables and the frozen dataclasses they stand for: names and types checked on the way in, plain text on the way out.

Contract: `build` refuses a key that the dataclass lacks, with the nearest name, a required one that is absent, and a
value of another type, each by name; what the values mean is checked by the dataclass itself. `dump` writes TOML that
`tomllib` reads back to the same values; None is left out, as TOML has none.
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
        SparsortError: it is missing, not UTF-8, not TOML, or holds what Python does not read (deep nesting, huge numbers).
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
        raise SparsortError(f"{path} holds a number with too many digits, or is nested too deeply.") from error


def build(cls: type[T], table: Mapping[str, Any], *, kind: str, where: str) -> T:
    """An object of the dataclass `cls` from a table.

    Args:
        cls: a keyword-only dataclass whose annotations are built of text, numbers, paths, literals, tuples, mappings
            of text and dataclasses; a list in the table becomes the tuple.
        table: key to value, as TOML or JSON gives them.
        kind: what the object is, for errors ("task", "ablation").
        where: where the table comes from, for errors.

    Raises:
        SparsortError: an unknown or missing key, or a value of another type.
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
    """Check the types of a frozen dataclass's fields, from its `__post_init__`; lists become tuples.

    Raises:
        SparsortError: a value of another type.
    """
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = _checked(field.name, getattr(instance, field.name), hints[field.name], where)
        object.__setattr__(instance, field.name, value)


def plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as what JSON and TOML have for them."""
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
    """`given` as the annotation has it, or `_MISMATCH`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        found = (_convert(given, option) for option in arguments)
        return next((value for value in found if value is not _MISMATCH), _MISMATCH)
    if origin is Literal:
        return given if any(given == choice and type(given) is type(choice) for choice in arguments) else _MISMATCH
    if origin is tuple:
        if not isinstance(given, (list, tuple)):
            return _MISMATCH
        items = [_convert(item, arguments[0]) for item in given]
        return _MISMATCH if any(item is _MISMATCH for item in items) else tuple(items)
    if origin is not None:
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
        # A whole number beyond the range of floats is none of them.
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
