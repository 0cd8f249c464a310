"""What a demonstration is called and what its text is, for the whole of `curriculum.demos`.

Contract: a row is a mapping from field name to value. Its id is the field `id` as text, or else its position. The
fields `label` and `answer` hold what a prompt asks for, so by default they take no part in comparing a row to a query.
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
    """The row's id as text: its field `id`, else its position.

    Raises:
        SparsortError: the field holds something without a text of its own, such as a list.
    """
    given = row.get(ID_FIELD)
    return str(position) if is_missing(given) else as_text(given, field=ID_FIELD, where=f"demonstration {position}")


def name_of(row: Row, position: int) -> str:
    """What an error calls the row: "demonstration 'q7'", or "demonstration 3" (counted from 0) where it has no id."""
    given = row.get(ID_FIELD)
    if is_missing(given) or not has_text(given):
        return f"demonstration {position}"
    return f"demonstration {as_text(given, field=ID_FIELD, where='')!r}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names for a message, the first few of many: "'a', 'b' and 3 more"."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def text_fields(row: Row, leave_out: Collection[str]) -> list[str]:
    """The fields that hold text, without the id and `leave_out`, in the row's order."""
    hidden = {ID_FIELD, *leave_out}
    return [name for name, value in row.items() if isinstance(value, str) and name not in hidden]


def text_of(row: Row, position: int, leave_out: Collection[str] = ()) -> str:
    """The row's text fields, without the id and `leave_out`, one a line.

    Raises:
        SparsortError: no field holds text.
    """
    names = text_fields(row, leave_out)
    if not names:
        raise SparsortError(
            f"{name_of(row, position)} has no text outside {listed([repr(name) for name in (ID_FIELD, *leave_out)])}; "
            f"it has: {', '.join(map(str, row)) or 'no fields'}. "
            "Say what to read with text=, a function from a row to its text."
        )
    return "\n".join(row[name] for name in names)
