"""Converts the conversations in data sets to chat turns: OpenAI and TRL (`role`, `content`), ShareGPT (`from`, `value`).

Contract: a turn is `{"role": "system" | "user" | "assistant", "content": text}`, whatever names the data uses. The answer of a
conversation is its last assistant turn. The turns before it are the prompt, and the turns after it are not read. A row without a
conversation or turns, or with a turn without content, gets no score. Anything else that is not a text conversation, such as an
image, a tool call or an unknown role, is refused with the name of the row.

Layouts: a list of turns; a dictionary of equally long lists, as `datasets` stores a sequence of dictionaries; several columns
that are concatenated (`prompt,completion` of TRL). A content may be a list of OpenAI's text parts, which are joined.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparsort.errors import SparsortError, unknown_choice
from sparsort.paths import canonical, column_of
from sparsort.values import is_list, is_missing, kind_of, value_at

Turn = dict[str, str]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
# The names of the two keys of a turn, in both layouts.
_KEYS = (("role", "content"), ("from", "value"))
# Roles of the results of tools, and keys of calls of tools, in the data sets that have them.
_TOOLS = ("tool", "function", "function_call", "observation", "ipython")
_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Fields are separated by commas. Text in brackets may contain commas; "]]" is a literal bracket.
_NAMES = re.compile(r"(?:\[(?:[^\]]|\]\])*\]|[^,\[])+")


def conversation_fields(messages: str) -> list[str]:
    """Parse the comma-separated fields of a conversation to their canonical spelling, or raise a `SparsortError`."""
    names = [name.strip() for name in _NAMES.findall(messages)]
    if not any(names):
        raise SparsortError(
            "messages (--messages) names no column. Give the column that holds the conversations, such as messages or "
            "conversations, or several separated by commas, such as prompt,completion."
        )
    return [canonical(name) for name in names if name]


def conversation_columns(messages: str) -> list[str]:
    """The columns that a conversation is read from."""
    return list(dict.fromkeys(map(column_of, conversation_fields(messages))))


def turns_of(row: Mapping[str, Any], messages: str, *, where: str) -> list[Turn]:
    """The turns of the conversation in a row; [] if it is missing, or if one of its turns has no content.

    Args:
        row: the row.
        messages: the fields of the conversation; see `conversation_fields`.
        where: the name of the row in error messages, such as "row 7 (id 'q7')".

    Raises:
        SparsortError: the row lacks a column, or a value is not a text conversation.
    """
    turns: list[Turn | None] = []
    for field in conversation_fields(messages):
        value = value_at(row, field, where=where)
        items = [] if is_missing(value) else _items(value, field, where)
        turns += [_turn(turn, f"{where}: turn {number} of {field!r}") for number, turn in enumerate(items)]
    complete = [turn for turn in turns if turn is not None]
    return complete if len(complete) == len(turns) else []


def split_answer(turns: Sequence[Turn]) -> tuple[list[Turn], str | None]:
    """Split a conversation into its prompt and the text of its last assistant turn, which is None if there is none."""
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    return (list(turns), None) if last is None else (list(turns[:last]), turns[last]["content"])


def question_text(turns: Sequence[Turn]) -> str:
    """The text by which conversations are compared: the turns before the answer, without system turns."""
    return "\n".join(turn["content"] for turn in turns if turn["role"] != "system")


def _items(value: Any, field: str, where: str) -> Sequence[Any]:
    if isinstance(value, Mapping) and any(key in value for keys in _KEYS for key in keys):
        columns = {key: column for key, column in value.items() if is_list(column)}
        if len({len(column) for column in columns.values()}) == 1:
            return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
    if is_list(value):
        return value  # type: ignore[no-any-return]
    raise SparsortError(
        f"{where} has {kind_of(value)} in the field {field!r}, where a conversation was expected: a list of turns such as "
        '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], or with "from" and "value". '
        "Name the column of the conversations with messages (--messages). For text, use a prompt template instead."
    )


def _turn(turn: Any, where: str) -> Turn | None:
    """A turn in the form that the contract of this module defines; None if it has no content."""
    if not isinstance(turn, Mapping):
        raise SparsortError(
            f'{where} is {kind_of(turn)}; expected a dictionary such as {{"role": "user", "content": "…"}}.'
        )
    keys = next((keys for keys in _KEYS if keys[0] in turn), None)
    if keys is None:
        raise SparsortError(
            f"{where} has the keys {', '.join(map(str, turn)) or 'none'}; expected role and content, or from and value."
        )
    role, content = turn[keys[0]], turn.get(keys[1])
    if role in _TOOLS or any(_has_value(turn.get(name)) for name in _CALLS):
        raise SparsortError(
            f"{where} contains a tool call or its result, but only text turns can be read. Remove the row, or reduce the "
            "conversation to its text turns."
        )
    if not isinstance(role, str) or role not in ROLES:
        raise SparsortError(f"{where}: {unknown_choice('role', str(role), ROLES)}")
    return None if is_missing(content) else {"role": ROLES[role], "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if is_list(content):
        return "".join(_part(part, where) for part in content)
    raise SparsortError(f"{where} has {kind_of(content)} as its content; expected text, or a list of text parts.")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(text, str):
        return text
    description = f"a part of the type {kind!r}" if isinstance(kind, str) else kind_of(part)
    raise SparsortError(
        f'{where} contains {description}, but only text can be read: {{"type": "text", "text": "…"}}. Remove the row, or reduce '
        "the conversation to its text."
    )


def _has_value(value: Any) -> bool:
    # Some data sets give every turn an empty list of tool calls.
    return not is_missing(value) and not (is_list(value) and not len(value))
