"""Options of the command line, each declared once: as a field of the frozen dataclass that the code reads.

Contract: `option` makes the field, and its `Option` says how a command shows it. `sparsort.recipes.options` makes the
parameters of the commands from the fields, and the dataclass from the values of a call. A field without an `Option` is for
Python alone, and a field whose default is itself such a dataclass brings the options of that dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsort.errors import SparsortError

_KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """How a command shows a field.

    Attributes:
        help: what it does, for `--help`.
        panel: the group of options in which the help lists it; None for the unnamed first one.
        parameter: the name of the option; None for the name of the field.
        flag: None for the parameter's name with hyphens ("--max-length").
        short: a second flag, such as "-m".
        retired: earlier flags, accepted with a warning for one release.
        kind: the type of its value on the command line; None for that of the field.
        read: what makes the field's value from the text of the command line; None to keep the value.
    """

    help: str
    panel: str | None = None
    parameter: str | None = None
    flag: str | None = None
    short: str | None = None
    retired: tuple[str, ...] = ()
    kind: Any = None
    read: Callable[[Any], Any] | None = None


def option(
    default: Any,
    help: str,
    *,
    panel: str | None = None,
    parameter: str | None = None,
    flag: str | None = None,
    short: str | None = None,
    retired: tuple[str, ...] = (),
    kind: Any = None,
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of a dataclass with an option of the command line; for the arguments see `Option`."""
    shown = Option(
        help=help, panel=panel, parameter=parameter, flag=flag, short=short, retired=retired, kind=kind, read=read
    )
    return dataclasses.field(default=default, metadata={_KEY: shown})


def same_option(kind: type, name: str, *, default: Any = dataclasses.MISSING, help: str | None = None) -> Any:
    """A field with the option of another dataclass's field: one declaration for a setting that two of them hold.

    Args:
        kind: the other dataclass.
        name: its field.
        default: None of its own, or the one that differs here.
        help: what differs about it here.
    """
    field = next(one for one in dataclasses.fields(kind) if one.name == name)
    shown = dataclasses.replace(field.metadata[_KEY], **({"help": help} if help is not None else {}))
    return dataclasses.field(
        default=field.default if default is dataclasses.MISSING else default, metadata={_KEY: shown}
    )


def option_of(field: dataclasses.Field[Any]) -> Option | None:
    """The option of a field, or None for a field that has none."""
    return field.metadata.get(_KEY)


def parameter_of(field: dataclasses.Field[Any]) -> str:
    """The name under which a field's value is known to conditions and messages."""
    shown = option_of(field)
    return shown.parameter if shown is not None and shown.parameter is not None else field.name


def has_options(kind: Any) -> bool:
    """Whether a type is a dataclass with at least one option."""
    return dataclasses.is_dataclass(kind) and any(option_of(one) for one in dataclasses.fields(kind))


def parameters_of(kind: type) -> tuple[str, ...]:
    """The names of all options of a dataclass, those of the dataclasses in it included, in their order."""
    found: list[str] = []
    for field in dataclasses.fields(kind):
        if has_options(type(field.default)):
            found += parameters_of(type(field.default))
        elif option_of(field) is not None:
            found.append(parameter_of(field))
    return tuple(found)


def values_of(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each setting of a dataclass with its value and its default, those of the dataclasses in it included."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = None if field.default is dataclasses.MISSING else field.default
        if has_options(type(value)) and has_options(type(default)):
            yield from ((name, own, of) for name, own, of in values_of(value))
        else:
            yield parameter_of(field), value, default


def shares(flag: str) -> Callable[[Sequence[str] | None], dict[str, float] | None]:
    """A reader of NAME=NUMBER, each name once, for an option that may be given several times."""

    def read(texts: Sequence[str] | None) -> dict[str, float] | None:
        found: dict[str, float] = {}
        for text in texts or ():
            name, equals, value = text.rpartition("=")
            try:
                number = float(value)
            except ValueError:
                equals = ""
            if not equals or not name:
                raise SparsortError(f"{flag} {text!r} is not NAME=NUMBER, as in {flag} {name or text or 'web'}=0.7.")
            if name in found:
                raise SparsortError(f"{flag} gives {name!r} twice. Give it once.")
            found[name] = number
        return found or None

    return read


def unescape(text: str | None) -> str | None:
    r"""Read \n, \t and \\ as a shell user means them."""
    if text is None:
        return None
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)


def escape(text: str | None) -> str | None:
    r"""A text as a shell user writes it, with \n, \t and \\; `unescape` reads it back."""
    return None if text is None else text.replace("\\", "\\\\").replace("\n", r"\n").replace("\t", r"\t")


def parts(text: str) -> tuple[str, ...]:
    """The names of a comma-separated list, without empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(flag: str) -> Callable[[str], tuple[int, ...]]:
    """A reader of whole numbers that are separated by commas."""

    def read(text: str) -> tuple[int, ...]:
        try:
            return tuple(map(int, parts(text)))
        except ValueError as error:
            raise SparsortError(f"{flag} is {text!r}; whole numbers separated by commas were expected.") from error

    return read


def names_in(text: str | None) -> tuple[str, ...] | None:
    """The names of a comma-separated list, without spaces around them; None for None."""
    return None if text is None else tuple(name.strip() for name in text.split(","))
