"""Prompt templates: format strings over a row's fields, such as "Question: {question}\\nAnswer:".

Contract: a template is data from the user and a field's value is data from the world, so neither may run code. Only
`{name}`, `{name!r}` and `{name:spec}` are read; attribute and index look-ups (`{x.__class__}`, `{x[0]}`) are refused.
A value is inserted once and never read as a template, whatever braces it holds. Literal braces are doubled: `{{`, `}}`.
"""

from __future__ import annotations

import difflib
import functools
import string
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparsort.errors import SparsortError


class _Piece(NamedTuple):
    literal: str
    field: str | None
    spec: str
    conversion: str | None


def fields_of(template: str) -> list[str]:
    """The field names of a template, each once, in the order of their first use.

    Raises:
        SparsortError: the template cannot be read, or holds something other than plain field names.
    """
    return list(dict.fromkeys(piece.field for piece in _pieces(template) if piece.field is not None))


def render(template: str, fields: Mapping[str, Any], *, where: str) -> str:
    """Fill a template from the fields of one row.

    Args:
        template: the format string.
        fields: field name to value; values are formatted by `format`, so numbers work as well as text.
        where: what the row is called in an error, such as "row 'q7' (line 8 of data.jsonl)".

    Raises:
        SparsortError: the template cannot be read; a field is missing or null; a value does not take its format spec.
    """
    parts: list[str] = []
    for literal, field, spec, conversion in _pieces(template):
        parts.append(literal)
        if field is None:
            continue
        value = fields.get(field)
        if value is None:
            raise missing_field(field, fields, where)
        if type(value) is str and not spec and conversion is None:
            parts.append(value)
            continue
        try:
            parts.append(format(_FORMATTER.convert_field(value, conversion), spec))
        except (TypeError, ValueError) as error:
            shown = textwrap.shorten(repr(value), 60, placeholder=" …")
            raise SparsortError(
                f"{where}: the value {shown} of the field {field!r} does not take the format {spec!r} ({error}). "
                f"Change the template {template!r} or the value."
            ) from error
    return "".join(parts)


_FORMATTER = string.Formatter()


@functools.lru_cache(maxsize=256)
def _pieces(template: str) -> tuple[_Piece, ...]:
    try:
        parsed = list(_FORMATTER.parse(template))
    except ValueError as error:
        raise SparsortError(
            f"the template {template!r} cannot be read: {error}. Write literal braces as {{{{ and }}}}."
        ) from error
    pieces = []
    for literal, field, spec, conversion in parsed:
        if field is not None:
            _check(template, field, spec or "", conversion)
        pieces.append(_Piece(literal, field, spec or "", conversion))
    return tuple(pieces)


def _check(template: str, field: str, spec: str, conversion: str | None) -> None:
    if not field or field.isdigit():
        raise SparsortError(
            f"the template {template!r} holds {{{field}}}, which names no field. "
            f"Write {{question}} for the field 'question', or {{{{{field}}}}} for literal braces."
        )
    if any(mark in field for mark in ".[]{}"):
        raise SparsortError(
            f"the template {template!r} holds {{{field}}}, but a template may only name fields, not look inside them. "
            "Put the part that you want into a field of its own."
        )
    if "{" in spec or "}" in spec:
        raise SparsortError(f"the template {template!r} nests braces in the format of {field!r}, which is not allowed.")
    if conversion not in (None, "r", "s", "a"):
        raise SparsortError(f"the template {template!r} asks for the conversion !{conversion}; choose !r, !s or !a.")


def missing_field(field: str, fields: Mapping[str, Any], where: str) -> SparsortError:
    """The error for a row whose `field` is absent or null, with the nearest name suggested."""
    names = [str(name) for name in fields]
    if field in fields:
        return SparsortError(f"{where} has null in the field {field!r}. Give it a value, or leave the row out.")
    near = difflib.get_close_matches(field, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return SparsortError(f"{where} has no field {field!r}.{hint} It has: {', '.join(names) or 'no fields'}.")
