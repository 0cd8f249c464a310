"""Prompt templates: format strings over a row's fields, such as "Question: {question}\\nAnswer:".

Contract: a template comes from the user and a field's value comes from a data set, so neither may run code. A field is a
column and a path of keys and indices into its value, as `sparsort.paths` parses it: `{question}`, `{meta.lang}`,
`{messages[0].content}`, `{[a.b]}`; attributes of objects are never looked up. A conversion and a format may follow, as in
`{name!r}` and `{score:.2f}`. An inserted value is never itself parsed as a template, whatever braces it contains. Literal
braces are doubled: `{{`, `}}`.

Text, numbers, booleans, dates and times are formatted by Python's `format`. A list or a dictionary has no text of its own and is
refused, except with `!r` or `!a`, which insert its `repr` or `ascii`.
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

# A field with its braces: name, conversion, format. The text inside brackets may contain any character.
_FIELD = re.compile(r"\{((?:\[(?:[^\]]|\]\])*\]|[^\[\]{}:!])*)(?:!([^:{}]*))?(?::([^{}]*))?\}")
_BRACE = re.compile(r"\{\{|\}\}|[{}]")
_FORMATTER = string.Formatter()


class Piece(NamedTuple):
    """Literal text and the field after it, in its canonical spelling; the field is None at the end of the template."""

    literal: str
    field: str | None
    spec: str
    conversion: str | None


def fields_of(template: str) -> list[str]:
    """The distinct fields of a template in their canonical spelling, in the order of their first use.

    Raises:
        SparsortError: the template cannot be read.
    """
    return list(dict.fromkeys(piece.field for piece in pieces(template) if piece.field is not None))


def columns_of(template: str) -> list[str]:
    """The distinct columns of the fields of a template, in the order of their first use.

    Raises:
        SparsortError: the template cannot be read.
    """
    return list(dict.fromkeys(map(column_of, fields_of(template))))


def render(template: str, fields: Mapping[str, Any], *, where: str) -> str:
    """Fill a template from the fields of one row.

    Args:
        template: the format string.
        fields: column → value.
        where: the name of the row in an error message, such as "row 'q7' (line 8 of data.jsonl)".

    Raises:
        SparsortError: the template cannot be read; or a field is missing or null, has no text of its own, or does not accept
            its format.
    """
    parts: list[str] = []
    for piece, value in _values(template, fields, where, ""):
        parts.append(piece.literal)
        if piece.field is None:
            continue
        if is_missing(value):
            raise missing_field(piece.field, fields, where, in_template=True)
        # The common case, plain text, needs no formatting.
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
        fields: column → value.
        where: as in `render`.
        way_out: a sentence that is added to the error message if a value, such as a list, has no text of its own.

    Raises:
        SparsortError: as for `render`, except that a missing value is not an error here.
    """
    values = _values(template, fields, where, way_out)
    return {piece.field for piece, value in values if piece.field is not None and is_missing(value)}


@functools.lru_cache(maxsize=256)
def pieces(template: str) -> tuple[Piece, ...]:
    """Split a template into literal texts, each with the field after it.

    Raises:
        SparsortError: the template cannot be read.
    """
    result: list[Piece] = []
    literal, at = "", 0
    while brace := _BRACE.search(template, at):
        literal += template[at : brace.start()]
        at = brace.end()
        # Doubled braces are literal.
        if len(brace[0]) == 2:
            literal += brace[0][0]
            continue
        # A single closing brace matches no field either, and gets the same message.
        field = _FIELD.match(template, brace.start())
        if field is None:
            raise SparsortError(
                f"the template {template!r} cannot be read from {template[brace.start() :]!r} on. Write a field as {{question}}, "
                "a part of it as {meta.lang} or {messages[0].content}, and literal braces as {{ and }}; braces do not nest."
            )
        result.append(_piece(template, literal, *field.groups()))
        literal, at = "", field.end()
    literal += template[at:]
    return (*result, Piece(literal, None, "", None)) if literal else tuple(result)


def _piece(template: str, literal: str, field: str, conversion: str | None, spec: str | None) -> Piece:
    if not field or field.isdigit():
        name = spell([field])
        raise SparsortError(
            f"the template {template!r} contains {{{field}}}, which names no field. Write {{question}} for the field 'question', "
            f"{{{name}}} for a column that is called {field!r}, or {{{{{field}}}}} for literal braces."
        )
    if conversion not in (None, "r", "s", "a"):
        raise SparsortError(f"the template {template!r} has the unknown conversion !{conversion}; choose !r, !s or !a.")
    try:
        return Piece(literal, canonical(field), spec or "", conversion)
    except SparsortError as error:
        raise SparsortError(f"the template {template!r}: {error}") from error


def _values(template: str, fields: Mapping[str, Any], where: str, way_out: str) -> Iterator[tuple[Piece, Any]]:
    """Yield each piece with the value of its field; refuse a value that the piece cannot render."""
    for piece in pieces(template):
        if piece.field is not None and column_of(piece.field) not in fields:
            raise missing_field(piece.field, fields, where, in_template=True)
        value = None if piece.field is None else value_at(fields, piece.field, where=where)
        # A missing value is not an error here: `render` and `check_values` treat it differently.
        if type(value) is not str and not is_missing(value) and not _can_show(piece, value):
            raise not_text(value, field=str(piece.field), where=where, way_out=way_out)
        yield piece, value


def _can_show(piece: Piece, value: Any) -> bool:
    return has_text(value) or (piece.conversion in ("r", "a") and _is_data(value))


def _is_data(value: Any) -> bool:
    """Whether a value is made only of dictionaries, lists and values that have a text, so that its `repr` is reproducible."""
    if isinstance(value, Mapping):
        return all(_is_data(key) and _is_data(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_data, value))
    return is_missing(value) or has_text(value)


def _formatted(template: str, piece: Piece, value: Any, where: str) -> str:
    try:
        return format(_FORMATTER.convert_field(scalar(value), piece.conversion), piece.spec)
    except (OverflowError, TypeError, ValueError) as error:
        excerpt = textwrap.shorten(repr(value), 60, placeholder=" …")
        raise SparsortError(
            f"{where}: the value {excerpt} of the field {piece.field!r} does not accept the format {piece.spec!r} ({error}). "
            f"Change the template {template!r} or the value."
        ) from error
