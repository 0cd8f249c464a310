"""The conditions under which an option has an effect, and the error for an option that has none.

Contract: a table maps every option of a call to its conditions. All of them must hold for the option to be read; `ALWAYS`, the
empty tuple, is for an option that is read whatever else is chosen. Only options that the caller passed are checked: the
command line knows which those are, and in Python they are the ones that differ from their defaults. A condition holds for a
value that is not a valid choice, so that the code that reads the value can report the misspelt name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsort.errors import SparsortError
from sparsort.options import values_of

Values = Mapping[str, Any]
# Formats an option and its value as the caller would write them.
Format = Callable[[str, Any], str]


@dataclass(frozen=True, kw_only=True)
class When:
    """One condition of an option.

    Attributes:
        holds: maps the values of all options of the call to whether the option is read.
        why: a clause that explains why the option is not read when `holds` is false; `{name}` is replaced by another option
            and its value, as the user would write them.
        instead: option values to suggest, under which the condition holds.
    """

    holds: Callable[[Values], bool]
    why: str
    instead: Mapping[str, Any] = field(default_factory=dict)


Conditions = tuple[When, ...]
Table = Mapping[str, Conditions]

ALWAYS: Conditions = ()


def always(*names: str) -> dict[str, Conditions]:
    """A table of options that are always read."""
    return dict.fromkeys(names, ALWAYS)


def under(condition: When, table: Table) -> dict[str, Conditions]:
    """The table with `condition` placed before the other conditions of every option."""
    return {name: (condition, *own) for name, own in table.items()}


def among(name: str, read_by: Collection[Any], *, of: Collection[Any]) -> When:
    """The condition of an option that only some choices of `name` read.

    Args:
        name: the option with the choices.
        read_by: the choices that read the option; the first is suggested.
        of: all choices of `name`.
    """
    # The complement, so that a misspelt choice is not among them and keeps its own error.
    ignored_by = frozenset(of) - frozenset(read_by)
    listed = " and ".join(map(str, read_by)) if len(read_by) <= 2 else ", ".join(map(str, read_by))
    return When(
        holds=lambda values: values[name] not in ignored_by,
        why=f"{listed} {'reads' if len(read_by) == 1 else 'read'} it, and this is {{{name}}}",
        instead={name: next(iter(read_by))},
    )


def needs(name: str, why: str, **example: Any) -> When:
    """The condition of an option that is read only if `name` is given too; `example` is a value to suggest for `name`."""
    return When(holds=lambda values: _is_given(values[name]), why=why, instead=example)


def excludes(name: str, why: str) -> When:
    """The condition of an option that is read only if `name` is not given."""
    return When(holds=lambda values: not _is_given(values[name]), why=why)


def in_python(name: str, value: Any) -> str:
    """An argument as it is written in Python: `metric='gini'`."""
    return name if value is None else f"{name}={value!r}"


def refuse_unread(table: Table, values: Values, given: Iterable[str], as_written: Format = in_python) -> None:
    """Refuse the first given option that has no effect.

    Args:
        table: the conditions of every option of this call.
        values: every option's value, the defaults included.
        given: the options that the caller passed.
        as_written: formats an option and its value for the message.

    Raises:
        SparsortError: an option has no effect; the message says why, and what to do instead.
    """
    for name in given:
        unmet = next((condition for condition in table[name] if not condition.holds(values)), None)
        if unmet is None:
            continue
        why = unmet.why.format_map(_OptionTexts(values, as_written))
        step = " ".join(as_written(other, value) for other, value in unmet.instead.items())
        raise SparsortError(
            f"{as_written(name, values[name])} has no effect: {why}. Omit it{f', or pass {step}' if step else ''}."
        )


def changed(config: Any) -> list[str]:
    """The settings of a dataclass that differ from their defaults, those of the dataclasses in it included."""
    return [name for name, value, default in values_of(config) if not _same(value, default)]


def refuse_unread_fields(config: Any, table: Table) -> None:
    """Refuse a setting of a dataclass that differs from its default and has no effect.

    Args:
        config: the dataclass.
        table: the conditions of its fields; a field that is not in the table is not checked.

    Raises:
        SparsortError: see `refuse_unread`.
    """
    # A default that was passed explicitly is not detected, which is harmless.
    values = {name: value for name, value, _ in values_of(config)}
    refuse_unread(table, values, [name for name in changed(config) if name in table])


def refuse_unread_arguments(function: Callable[..., Any], table: Table, values: Values) -> None:
    """Refuse an argument that differs from its default and has no effect.

    Args:
        function: the function whose signature has the defaults.
        table: the conditions of its arguments; an argument that is not in the table is not checked.
        values: the arguments, such as `locals()` at the beginning of the function.

    Raises:
        SparsortError: see `refuse_unread`.
    """
    defaults = {name: one.default for name, one in inspect.signature(function).parameters.items()}
    differing = [name for name in table if name in defaults and not _same(values[name], defaults[name])]
    refuse_unread(table, values, differing)


class _OptionTexts(dict[str, str]):
    """Option name → the option with its value as the caller would write it; only the names that a message uses are formatted."""

    def __init__(self, values: Values, as_written: Format) -> None:
        super().__init__()
        self._values, self._as_written = values, as_written

    def __missing__(self, name: str) -> str:
        return self._as_written(name, self._values[name])


def _is_given(value: Any) -> bool:
    # False and 0, such as `num_workers=0`, switch an option off; an empty text or list does not.
    return value is not None and not (isinstance(value, (bool, int)) and value == 0)


def _same(value: Any, default: Any) -> bool:
    # Arrays and tables compare element by element, which gives no single truth value. No default is an array or a table, so a
    # comparison of types comes first.
    return value is default or (type(value) is type(default) and bool(value == default))
