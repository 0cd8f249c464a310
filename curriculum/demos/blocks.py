"""Demonstrations and a query as the blocks of a prompt: each as text and as chat turns, from templates or from conversations.

Contract: no model and no tokenizer. A demonstration that cannot be shown whole (a missing value, a conversation without an
answer) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsort.curriculum.demos.budget import Messages
from sparsort.curriculum.demos.pool.leaks import Leak
from sparsort.curriculum.demos.pool.pool import input_fields, leaking_rows, only_field
from sparsort.curriculum.demos.pool.rows import Row, name_of
from sparsort.errors import SparsortError
from sparsort.scoring.prompts.conversations import Turn, conversation_fields, question_text, split_answer, turns_of
from sparsort.templates import render
from sparsort.values import is_missing, kind_of, missing_name, put, row_of


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What a prompt is put together from.

    Attributes:
        texts: each demonstration as text.
        turns: each demonstration as chat turns.
        asked: the query as text; `asked_turns` as chat turns.
        system: the text of the system turn, or of the first block of a plain prompt; None without one.
        leaks: demonstrations that are the query itself or nearly so.
    """

    texts: list[str]
    turns: list[Messages]
    asked: str
    asked_turns: Messages
    system: str | None
    leaks: list[Leak]


def template_blocks(
    demos: Sequence[Row], query: Row | str, prompt: str, answer: str, system: str | None, *, find_leaks: bool
) -> Blocks:
    """Blocks that templates fill; in chat an answer is stripped of the spaces around it.

    Raises:
        SparsortError: a field is missing, the query is bare text and the prompt has several fields, or what should be text is
            not.
    """
    for name, template in (("prompt", prompt), ("answer", answer)):
        if not isinstance(template, str):
            raise SparsortError(f"{name}= is a format string such as '{{{name}}}', not {_what(template)}.")
    if is_missing(system):
        system = None
    elif not isinstance(system, str):
        raise SparsortError(f"system= is the text of an instruction, not {_what(system)}.")
    if is_missing(query):
        raise SparsortError(f"the query is {_what(query)}. Give its text, or a row of its fields.")
    fields = input_fields(prompt)
    row = query if isinstance(query, Mapping) else row_of({only_field(fields): query})
    names = [name_of(demo, position) for position, demo in enumerate(demos)]
    questions = [render(prompt, demo, where=name) for demo, name in zip(demos, names, strict=True)]
    answers = [render(answer, demo, where=name) for demo, name in zip(demos, names, strict=True)]
    asked = render(prompt, row, where="the query")
    return Blocks(
        texts=[question + reply for question, reply in zip(questions, answers, strict=True)],
        turns=[
            [{"role": "user", "content": question}, {"role": "assistant", "content": reply.strip()}]
            for question, reply in zip(questions, answers, strict=True)
        ],
        asked=asked,
        asked_turns=[{"role": "user", "content": asked}],
        system=system,
        leaks=leaking_rows(demos, row, fields) if find_leaks else [],
    )


def conversation_blocks(demos: Sequence[Row], query: Row | str, messages: str, *, find_leaks: bool) -> Blocks:
    """Blocks that are the rows' own conversations, each up to its last assistant turn.

    The system turns of all must agree: there is one at the head of the prompt. Leaks are found by the text of the turns before
    the answer.

    Raises:
        SparsortError: a conversation cannot be read or has no answer, or the system turns differ.
    """
    row = query if isinstance(query, Mapping) else query_row(query, messages)
    shown = [demo_turns(demo, messages, where=name_of(demo, position)) for position, demo in enumerate(demos)]
    asked = _asked(turns_of(row, messages, where="the query"))
    everyone = [*shown, asked]
    systems = list(dict.fromkeys(turn["content"] for turns in everyone for turn in turns if turn["role"] == "system"))
    if len(systems) > 1:
        raise SparsortError(
            f"the conversations of one prompt have different system turns, such as {systems[0]!r} and {systems[1]!r}, and a "
            "prompt has one. Select demonstrations whose system turns agree with each other and with the query's."
        )
    texts = [{"text": question_text(split_answer(turns)[0])} for turns in shown]
    compared = {"text": question_text(asked)}
    return Blocks(
        texts=["\n".join(turn["content"] for turn in turns) for turns in shown],
        turns=[_without_system(turns) for turns in shown],
        asked=compared["text"],
        asked_turns=_without_system(asked),
        system=systems[0] if systems else None,
        leaks=leaking_rows(texts, compared, ["text"]) if find_leaks else [],
    )


def demo_turns(row: Row, messages: str, *, where: str) -> list[Turn]:
    """The turns of a demonstration, up to its answer: the last assistant turn.

    Raises:
        SparsortError: there is no conversation, or none with an answer.
    """
    asked, answer = split_answer(turns_of(row, messages, where=where))
    if answer is None or not answer.strip():
        raise SparsortError(
            f"{where} has no assistant turn in its conversation (messages={messages!r}), so it shows no answer. "
            "Leave the row out."
        )
    return [*asked, {"role": "assistant", "content": answer}]


def compared_text(row: Row, messages: str, *, where: str) -> str:
    """The text that the conversation of a demonstration or a query is compared and embedded by.

    Raises:
        SparsortError: the conversation cannot be read.
    """
    return question_text(split_answer(turns_of(row, messages, where=where))[0])


def query_row(query: str | Sequence[Any], messages: str) -> dict[str, Any]:
    """A query as a row whose conversation asks for its answer: from bare text, which is a user's turn, or from turns.

    Raises:
        SparsortError: a turn cannot be read.
    """
    first, *others = conversation_fields(messages)
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else list(query)
    read = _asked(turns_of({"query": turns}, "query", where="the query"))
    row = put({}, first, [*read, {"role": "assistant", "content": ""}])
    for field in others:
        row = put(row, field, None)
    return row


def _asked(turns: list[Turn]) -> list[Turn]:
    """The turns of a query without the answer that its row may hold."""
    asked = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    if not any(turn["content"].strip() for turn in asked):
        raise SparsortError(
            'the query has no turn with text. Pass its text, or turns such as [{"role": "user", "content": "…"}].'
        )
    return asked


def _without_system(turns: list[Turn]) -> Messages:
    return [turn for turn in turns if turn["role"] != "system"]


def _what(value: Any) -> str:
    return missing_name(value) if is_missing(value) else kind_of(value)
