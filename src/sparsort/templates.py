"""Prompt templates: format strings over a row's fields, such as "Question: {question}\\nAnswer:".

Contract: a template is data from the user and a field's value is data from the world, so neither may run code. A field is a
column and a path of keys and indices into its value, as `sparsort.paths` reads it: `{question}`, `{meta.lang}`,
`{messages[0].content}`, `{[a.b]}`; attributes of objects are never looked up. A conversion and a format may follow, as in
`{name!r}` and `{score:.2f}`. A value is inserted once and never read as a template, whatever braces it holds. Literal braces
are doubled: `{{`, `}}`.

Text, numbers, booleans, dates and times are written as Python's `format` writes them. A list or a dictionary is refused, except
with `!r` or `!a`: those ask for Python's notation of the value, and get it.
"""

from __future__ import annotations

import functools
import re
import string
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sparsort.errors import SparsortError
from sparsort.paths import canonical, column_of, spell
from sparsort.values import has_text, is_missing, missing_field, not_text, scalar, value_at

# Up to the end of a field: text in brackets may hold anything.
_FIELD = re.compile(r"\{((?:\[(?:[^\]]|\]\])*\]|[^\[\]{}:!])*)(?:!([^:{}]*))?(?::([^{}]*))?\}")
_BRACE = re.compile(r"\{\{|\}\}|[{}]")
_FORMATTER = string.Formatter()


class Piece(NamedTuple):
    """Literal text, and the field after it: its canonical spelling, or None where the template ends without one."""

    literal: str
    field: str | None
    spec: str
    conversion: str | None


def fields_of(template: str) -> list[str]:
    """The fields of a template in their canonical spelling, each once, in the order of their first use.

    Raises:
        SparsortError: the template cannot be read.
    """
    return list(dict.fromkeys(piece.field for piece in pieces(template) if piece.field is not None))


def columns_of(template: str) -> list[str]:
    """The columns that the fields of a template look into, each once, in the order of their first use.

    Raises:
        SparsortError: the template cannot be read.
    """
    return list(dict.fromkeys(map(column_of, fields_of(template))))


def render(template: str, fields: Mapping[str, Any], *, where: str) -> str:
    """Fill a template from the fields of one row.

    Args:
        template: the format string.
        fields: column to value.
        where: what the row is called in an error, such as "row 'q7' (line 8 of data.jsonl)".

    Raises:
        SparsortError: the template cannot be read; a field is missing or null, has no text of its own, or does not take its
            format.
    """
    parts: list[str] = []
    for piece, value in _values(template, fields, where, ""):
        parts.append(piece.literal)
        if piece.field is None:
            continue
        if is_missing(value):
            raise missing_field(piece.field, fields, where, in_template=True)
        parts.append(
            value
            if type(value) is str and not piece.spec and not piece.conversion
            else _formatted(template, piece, value, where)
        )
    return "".join(parts)


def check_values(template: str, fields: Mapping[str, Any], *, where: str, way_out: str = "") -> set[str]:
    """The fields of a template that are missing in one row.

    Args:
        template: the format string.
        fields: column to value.
        where: as in `render`.
        way_out: a sentence for the error about a value without a text of its own.

    Raises:
        SparsortError: as `render`, but a missing value is no error here.
    """
    found = _values(template, fields, where, way_out)
    return {piece.field for piece, value in found if piece.field is not None and is_missing(value)}


@functools.lru_cache(maxsize=256)
def pieces(template: str) -> tuple[Piece, ...]:
    """A template as literal texts, each with the field after it.

    Raises:
        SparsortError: the template cannot be read.
    """
    found: list[Piece] = []
    literal, at = "", 0
    while brace := _BRACE.search(template, at):
        literal += template[at : brace.start()]
        at = brace.end()
        if len(brace[0]) == 2:
            literal += brace[0][0]
            continue
        field = _FIELD.match(template, brace.start())
        if field is None:
            raise SparsortError(
                f"the template {template!r} cannot be read from {template[brace.start() :]!r} on. Write a field as {{question}}, "
                "a part of it as {meta.lang} or {messages[0].content}, and literal braces as {{ and }}; braces do not nest."
            )
        found.append(_piece(template, literal, *field.groups()))
        literal, at = "", field.end()
    literal += template[at:]
    return (*found, Piece(literal, None, "", None)) if literal else tuple(found)


def _piece(template: str, literal: str, field: str, conversion: str | None, spec: str | None) -> Piece:
    if not field or field.isdigit():
        name = spell([field])
        raise SparsortError(
            f"the template {template!r} holds {{{field}}}, which names no field. Write {{question}} for the field 'question', "
            f"{{{name}}} for a column that is called {field!r}, or {{{{{field}}}}} for literal braces."
        )
    if conversion not in (None, "r", "s", "a"):
        raise SparsortError(f"the template {template!r} asks for the conversion !{conversion}; choose !r, !s or !a.")
    try:
        return Piece(literal, canonical(field), spec or "", conversion)
    except SparsortError as error:
        raise SparsortError(f"the template {template!r}: {error}") from error


def _values(template: str, fields: Mapping[str, Any], where: str, way_out: str) -> Iterator[tuple[Piece, Any]]:
    """Each piece with the value of its field; a value that the piece cannot show is refused."""
    for piece in pieces(template):
        if piece.field is not None and column_of(piece.field) not in fields:
            raise missing_field(piece.field, fields, where, in_template=True)
        value = None if piece.field is None else value_at(fields, piece.field, where=where)
        if type(value) is not str and not is_missing(value) and not _can_show(piece, value):
            raise not_text(value, field=str(piece.field), where=where, way_out=way_out)
        yield piece, value


def _can_show(piece: Piece, value: Any) -> bool:
    return has_text(value) or (piece.conversion in ("r", "a") and _is_data(value))


def _is_data(value: Any) -> bool:
    """Whether a value is made of dictionaries, lists and values with a text, so that its notation is the same everywhere."""
    if isinstance(value, Mapping):
        return all(_is_data(key) and _is_data(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    return is_missing(value) or has_text(value)


def _formatted(template: str, piece: Piece, value: Any, where: str) -> str:
    try:
        return format(_FORMATTER.convert_field(scalar(value), piece.conversion), piece.spec)
    except (OverflowError, TypeError, ValueError) as error:
        shown = textwrap.shorten(repr(value), 60, placeholder=" …")
        raise SparsortError(
            f"{where}: the value {shown} of the field {piece.field!r} does not take the format {piece.spec!r} ({error}). "
            f"Change the template {template!r} or the value."
        ) from error
