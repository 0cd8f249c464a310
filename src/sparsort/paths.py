"""How a field is written: a column, and a path into its value.

    question                  the column "question"
    meta.lang                 the key "lang" of the dictionary in the column "meta"
    messages[0].content       the first item of a list; [-1] is the last one
    [a.b]   meta[first.name]  a name that itself has dots, brackets, braces, a colon or an exclamation mark

Contract: a dot outside brackets always begins a key and never belongs to a column's name, so a field has one reading whatever
columns the data has. Inside brackets every character stands for itself; a closing bracket is doubled. A field that can be
written without brackets has one canonical spelling, that of `spell`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from sparsort.errors import SparsortError

_IN_BRACKETS = r"\[((?:[^\]]|\]\])*)\]"
_COLUMN = re.compile(rf"{_IN_BRACKETS}|([^.\[\]{{}}]+)")
_STEP = re.compile(rf"{_IN_BRACKETS}|\.([^.\[\]{{}}]+)")
# In a template a colon begins the format and an exclamation mark the conversion.
_PLAIN = re.compile(r"[^.\[\]{}:!]+")
_INDEX = re.compile(r"-?[0-9]+")


@functools.lru_cache(maxsize=1024)
def parse_field(field: str) -> tuple[str, ...]:
    """The column and the steps into its value, as text.

    Raises:
        SparsortError: the field cannot be read.
    """
    parts: list[str] = []
    at = 0
    while at < len(field) or not parts:
        found = (_STEP if parts else _COLUMN).match(field, at)
        if found is None:
            raise SparsortError(
                f"the field {field!r} cannot be read from {field[at:]!r} on. Write a column and a path into its value, such as "
                "question, meta.lang or messages[0].content; a column whose name has dots or brackets goes into brackets, "
                "such as [a.b], with ] doubled."
            )
        in_brackets, plain = found.groups()
        parts.append(plain if in_brackets is None else in_brackets.replace("]]", "]"))
        at = found.end()
    return tuple(parts)


def spell(parts: Iterable[str | int]) -> str:
    """The canonical spelling of a column and the steps into its value."""
    column, *steps = parts
    return _spell_column(str(column)) + "".join(map(_spell_step, steps))


def canonical(field: str) -> str:
    """The canonical spelling of a field: equal for two spellings of one field.

    Raises:
        SparsortError: the field cannot be read.
    """
    return spell(parse_field(field))


def column_of(field: str) -> str:
    """The column that a field looks into."""
    return parse_field(field)[0]


def is_index(step: str) -> bool:
    """Whether a step can count the items of a list."""
    return _INDEX.fullmatch(step) is not None


def _spell_column(name: str) -> str:
    # `{0}` is Python's positional argument, which no row has.
    return name if _PLAIN.fullmatch(name) and not name.isdigit() else _bracketed(name)


def _spell_step(step: str | int) -> str:
    return f".{step}" if _PLAIN.fullmatch(str(step)) and not is_index(str(step)) else _bracketed(str(step))


def _bracketed(text: str) -> str:
    return f"[{text.replace(']', ']]')}]"
