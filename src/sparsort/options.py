"""Command-line options, each declared once, as a field of the frozen dataclass that the code reads.

Contract: `option` creates the field, and its `Option` describes how a command presents it. `recipes.cli.options` makes the
parameters of the commands from the fields, and the dataclass from the values of a call. A field without an `Option` can
be set only in Python. A field whose default is itself such a dataclass adds the options of that dataclass.
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
    """How a command presents a field.

    Attributes:
        help: the description for `--help`.
        names: the place of a table or a `Literal` ("curriculum.demos.order:ORDERS"), whose names replace `{names}` in the help
            text. It is loaded only when the help is printed, because its module may import NumPy.
        panel: the group in which the help lists the option; None for the first group, which has no name.
        parameter: the name of the option; None for the name of the field.
        flag: the flag; None for the parameter's name with hyphens ("--max-length").
        short: a second flag, such as "-m".
        retired: earlier flags, accepted with a warning for one release.
        retired_for: for a retired flag that now belongs to another option, the test that a value of the earlier meaning passes.
        kind: the type of the value on the command line; None for the type of the field.
        read: a function that converts the value from the command line into that of the field; None to keep the value.
    """

    help: str
    names: str | None = None
    panel: str | None = None
    parameter: str | None = None
    flag: str | None = None
    short: str | None = None
    retired: tuple[str, ...] = ()
    retired_for: Callable[[str], bool] | None = None
    kind: Any = None
    read: Callable[[Any], Any] | None = None


def option(
    default: Any,
    help: str,
    *,
    names: str | None = None,
    panel: str | None = None,
    parameter: str | None = None,
    flag: str | None = None,
    short: str | None = None,
    retired: tuple[str, ...] = (),
    retired_for: Callable[[str], bool] | None = None,
    kind: Any = None,
    read: Callable[[Any], Any] | None = None,
) -> Any:
    """Create a dataclass field with a command-line option.

    Args:
        default: the default of the field; `dataclasses.MISSING` for an option that must be given.
        help, names, panel, parameter, flag, short, retired, retired_for, kind, read: see `Option`.
    """
    shown = Option(
        help=help,
        names=names,
        panel=panel,
        parameter=parameter,
        flag=flag,
        short=short,
        retired=retired,
        retired_for=retired_for,
        kind=kind,
        read=read,
    )
    return dataclasses.field(default=default, metadata={_KEY: shown})


def same_option(kind: type, name: str, *, default: Any = dataclasses.MISSING, help: str | None = None) -> Any:
    """Create a field with the option of a field in another dataclass, so that a setting of both is declared once.

    Args:
        kind: the other dataclass.
        name: the field in that dataclass.
        default: another default; by default that of the other field.
        help: another help text; None for that of the other field.
    """
    field = next(one for one in dataclasses.fields(kind) if one.name == name)
    shown = dataclasses.replace(field.metadata[_KEY], **({"help": help} if help is not None else {}))
    return dataclasses.field(
        default=field.default if default is dataclasses.MISSING else default, metadata={_KEY: shown}
    )


def option_of(field: dataclasses.Field[Any]) -> Option | None:
    """The option of a field; None if the field has no option."""
    return field.metadata.get(_KEY)


def parameter_of(field: dataclasses.Field[Any]) -> str:
    """The name of a field in conditions and messages."""
    shown = option_of(field)
    return shown.parameter if shown is not None and shown.parameter is not None else field.name


def has_options(kind: Any) -> bool:
    """Whether a type is a dataclass with at least one option."""
    return dataclasses.is_dataclass(kind) and any(option_of(one) for one in dataclasses.fields(kind))


def parameters_of(kind: type) -> tuple[str, ...]:
    """The names of all options of a dataclass in order, including those of nested dataclasses."""
    names: list[str] = []
    for field in dataclasses.fields(kind):
        if has_options(type(field.default)):
            names += parameters_of(type(field.default))
        elif option_of(field) is not None:
            names.append(parameter_of(field))
    return tuple(names)


def values_of(config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, value and default of each setting of a dataclass, including those of nested dataclasses."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = None if field.default is dataclasses.MISSING else field.default
        if has_options(type(value)) and has_options(type(default)):
            yield from values_of(value)
        else:
            yield parameter_of(field), value, default


def shares(flag: str) -> Callable[[Sequence[str] | None], dict[str, float] | None]:
    """A function that reads NAME=NUMBER, with each name once, for an option that may be given several times."""

    def read(texts: Sequence[str] | None) -> dict[str, float] | None:
        share_of: dict[str, float] = {}
        for text in texts or ():
            name, equals, value = text.rpartition("=")
            try:
                number = float(value)
            except ValueError:
                equals = ""
            if not equals or not name:
                raise SparsortError(f"{flag} {text!r} is not NAME=NUMBER, as in {flag} {name or text or 'web'}=0.7.")
            if name in share_of:
                raise SparsortError(f"{flag} gives {name!r} twice. Give it once.")
            share_of[name] = number
        return share_of or None

    return read


def unescape(text: str | None) -> str | None:
    r"""Replace the escapes \n, \t and \\, which a shell passes literally, by their characters."""
    if text is None:
        return None
    # Splitting at double backslashes first keeps the n in \\n from being read as a newline.
    parts = text.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\t", "\t") for part in parts)


def escape(text: str | None) -> str | None:
    r"""The inverse of `unescape`: write newlines, tabs and backslashes as \n, \t and \\."""
    return None if text is None else text.replace("\\", "\\\\").replace("\n", r"\n").replace("\t", r"\t")


def parts(text: str) -> tuple[str, ...]:
    """The items of a comma-separated list, without empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def whole_numbers(flag: str) -> Callable[[str], tuple[int, ...]]:
    """A function that reads whole numbers separated by commas."""

    def read(text: str) -> tuple[int, ...]:
        try:
            return tuple(map(int, parts(text)))
        except ValueError as error:
            raise SparsortError(f"{flag} is {text!r}; whole numbers separated by commas were expected.") from error

    return read


def names_in(text: str | None) -> tuple[str, ...] | None:
    """The names in a comma-separated list, without surrounding spaces; None if the text is None."""
    return None if text is None else tuple(name.strip() for name in text.split(","))
