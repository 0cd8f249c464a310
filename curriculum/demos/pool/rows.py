"""The name, the id and the text of a demonstration, for all of `curriculum.demos`.

Contract: a row is a mapping from field name to value. Its id is the field `id` as text, or else its position. The fields `label`
and `answer` contain what a prompt asks for, so by default they take no part when a row is compared with a query.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sparsort.errors import SparsortError
from sparsort.values import as_text, has_text, is_missing

Row = Mapping[str, Any]
TextOf = Callable[[Row], str]

ID_FIELD = "id"
ANSWER_FIELDS = ("label", "answer")


def id_of(row: Row, position: int) -> str:
    """The row's id as text: its field `id`, or else its position.

    Raises:
        SparsortError: the field's value has no text of its own, such as a list.
    """
    value = row.get(ID_FIELD)
    return str(position) if is_missing(value) else as_text(value, field=ID_FIELD, where=f"demonstration {position}")


def name_of(row: Row, position: int) -> str:
    """The row's name in error messages: "demonstration 'q7'", or "demonstration 3" (counted from 0) if it has no id."""
    value = row.get(ID_FIELD)
    if is_missing(value) or not has_text(value):
        return f"demonstration {position}"
    return f"demonstration {as_text(value, field=ID_FIELD, where='')!r}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in a message, at most `most` of them: "'a', 'b' and 3 more"."""
    first = ", ".join(names[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most} more"


def text_fields(row: Row, excluded: Collection[str]) -> list[str]:
    """The fields that contain text, without the id and the `excluded` fields, in the row's order."""
    hidden = {ID_FIELD, *excluded}
    return [name for name, value in row.items() if isinstance(value, str) and name not in hidden]


def text_of(row: Row, position: int, excluded: Collection[str] = ()) -> str:
    """The text fields of a row, without the id and the `excluded` fields, one on each line.

    Raises:
        SparsortError: no field contains text.
    """
    names = text_fields(row, excluded)
    if not names:
        raise SparsortError(
            f"{name_of(row, position)} has no text outside {listed([repr(name) for name in (ID_FIELD, *excluded)])}; "
            f"it has: {', '.join(map(str, row)) or 'no fields'}. "
            "Pass text=, a function from a row to its text."
        )
    return "\n".join(row[name] for name in names)
