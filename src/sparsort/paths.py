"""The notation for fields: a column, and a path into its value.

    question                  the column "question"
    meta.lang                 the key "lang" of the dictionary in the column "meta"
    messages[0].content       the first item of a list; [-1] is the last one
    [a.b]   meta[first.name]  a name that contains dots, brackets, braces, a colon or an exclamation mark

Contract: a dot outside brackets always begins a key and never belongs to a column's name, so a field has one meaning, whatever
columns the data has. Inside brackets every character is literal, and a closing bracket is doubled. A field may have several
spellings; `spell` returns the canonical one.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from sparsort.errors import SparsortError

_IN_BRACKETS = r"\[((?:[^\]]|\]\])*)\]"
_COLUMN = re.compile(rf"{_IN_BRACKETS}|([^.\[\]{{}}]+)")
_STEP = re.compile(rf"{_IN_BRACKETS}|\.([^.\[\]{{}}]+)")
# A colon and an exclamation mark need brackets too: in a template they begin the format and the conversion.
_PLAIN = re.compile(r"[^.\[\]{}:!]+")
_INDEX = re.compile(r"-?[0-9]+")


@functools.lru_cache(maxsize=1024)
def parse_field(field: str) -> tuple[str, ...]:
    """Parse a field into its column and the steps into its value, as text.

    Raises:
        SparsortError: the field is not in the notation above.
    """
    parts: list[str] = []
    at = 0
    while at < len(field) or not parts:
        match = (_STEP if parts else _COLUMN).match(field, at)
        if match is None:
            raise SparsortError(
                f"the field {field!r} cannot be read from {field[at:]!r} on. Write a column and a path into its value, such as "
                "question, meta.lang or messages[0].content; put a column whose name has dots or brackets into brackets, "
                "such as [a.b], with ] doubled."
            )
        # Exactly one of the two groups matched.
        in_brackets, plain = match.groups()
        parts.append(plain if in_brackets is None else in_brackets.replace("]]", "]"))
        at = match.end()
    return tuple(parts)


def spell(parts: Iterable[str | int]) -> str:
    """The canonical spelling of a column and the steps into its value."""
    # A name such as "a.b" gets brackets, so that parsing the result gives the same parts.
    column, *steps = parts
    return _spell_column(str(column)) + "".join(map(_spell_step, steps))


def canonical(field: str) -> str:
    """The canonical spelling of a field, which is the same for all spellings of one field.

    Raises:
        SparsortError: the field cannot be read.
    """
    return spell(parse_field(field))


def column_of(field: str) -> str:
    """The column of a field."""
    return parse_field(field)[0]


def is_index(step: str) -> bool:
    """Whether a step can be an index into a list."""
    return _INDEX.fullmatch(step) is not None


def _spell_column(name: str) -> str:
    # A column named "0" needs brackets, because `{0}` is a positional argument in Python's templates.
    return name if _PLAIN.fullmatch(name) and not name.isdigit() else _bracketed(name)


def _spell_step(step: str | int) -> str:
    return f".{step}" if _PLAIN.fullmatch(str(step)) and not is_index(str(step)) else _bracketed(str(step))


def _bracketed(text: str) -> str:
    return f"[{text.replace(']', ']]')}]"
