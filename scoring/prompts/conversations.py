"""Conversations as datasets store them, as chat turns: OpenAI and TRL (`role`, `content`), ShareGPT (`from`, `value`).

Contract: a turn is `{"role": "system" | "user" | "assistant", "content": text}`, whatever the data calls them. The answer of a
conversation is its last assistant turn; what comes before is its prompt, and what comes after is not read. A conversation
that is missing or has no turns is the row's own lack, and so is a turn without content. Anything else that is not a text
conversation, such as an image, a tool call or an unknown role, is refused with the name of the row.

Forms: a list of turns; a dictionary of equally long lists, as `datasets` stores a sequence of dictionaries; several columns
one after the other (`prompt,completion` of TRL). A content may be a list of OpenAI's text parts, which are joined.
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
# Names of the two keys of a turn.
_KEYS = (("role", "content"), ("from", "value"))
_TOOLS = ("tool", "function", "function_call", "observation", "ipython")
_CALLS = ("tool_calls", "function_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
# Fields that are separated by commas; text in brackets may hold commas.
_NAMES = re.compile(r"(?:\[(?:[^\]]|\]\])*\]|[^,\[])+")


def conversation_fields(messages: str) -> list[str]:
    """The fields that make a conversation, in their canonical spelling: one, or several separated by commas.

    Raises:
        SparsortError: a field cannot be read, or there is none.
    """
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
    """The turns of a row's conversation; [] where it is missing, or a turn of it has no content.

    Args:
        row: the row.
        messages: the fields of the conversation, see `conversation_fields`.
        where: what the row is called in an error, such as "row 7 (id 'q7')".

    Raises:
        SparsortError: the row lacks a column; or there is something that is not a text conversation.
    """
    turns: list[Turn | None] = []
    for field in conversation_fields(messages):
        value = value_at(row, field, where=where)
        items = [] if is_missing(value) else _items(value, field, where)
        turns += [_turn(turn, f"{where}: turn {number} of {field!r}") for number, turn in enumerate(items)]
    whole = [turn for turn in turns if turn is not None]
    return whole if len(whole) == len(turns) else []


def split_answer(turns: Sequence[Turn]) -> tuple[list[Turn], str | None]:
    """The prompt of a conversation, and its answer: the last assistant turn; None where there is no such turn."""
    last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    return (list(turns), None) if last is None else (list(turns[:last]), turns[last]["content"])


def question_text(turns: Sequence[Turn]) -> str:
    """The text of the turns before an answer, without system turns: what conversations are compared by."""
    return "\n".join(turn["content"] for turn in turns if turn["role"] != "system")


def _items(value: Any, field: str, where: str) -> Sequence[Any]:
    if isinstance(value, Mapping) and any(key in value for keys in _KEYS for key in keys):
        columns = {key: held for key, held in value.items() if is_list(held)}
        if len({len(held) for held in columns.values()}) == 1:
            return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
    if is_list(value):
        return value  # type: ignore[no-any-return]
    raise SparsortError(
        f"{where} has {kind_of(value)} in the field {field!r}, where a conversation was expected: a list of turns such as "
        '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}], or with "from" and "value". '
        "Name the column that holds one with messages (--messages); for text, use a prompt template instead."
    )


def _turn(turn: Any, where: str) -> Turn | None:
    """A turn as this module's contract has it; None where it has no content."""
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
    if role in _TOOLS or any(_holds(turn.get(name)) for name in _CALLS):
        raise SparsortError(
            f"{where} holds a tool call or its result, and only turns of text are read. Leave the row out, or make the "
            "conversation of its text turns."
        )
    if not isinstance(role, str) or role not in ROLES:
        error = unknown_choice("role", str(role), ROLES)
        raise SparsortError(f"{where}: {error}")
    return None if is_missing(content) else {"role": ROLES[role], "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if is_list(content):
        return "".join(_part(part, where) for part in content)
    raise SparsortError(f"{where} has {kind_of(content)} as its content; expected text, or a list of parts of text.")


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind in _TEXT_PARTS and isinstance(text, str):
        return text
    what = f"a part of the type {kind!r}" if isinstance(kind, str) else kind_of(part)
    raise SparsortError(
        f'{where} holds {what}, and only text is read: {{"type": "text", "text": "…"}}. Leave the row out, or make the '
        "conversation of its text."
    )


def _holds(value: Any) -> bool:
    return not is_missing(value) and not (is_list(value) and not len(value))
