"""Demonstrations and a query as the blocks of a prompt: each as text and as chat turns, from templates or from conversations.

Contract: neither a model nor a tokenizer is needed. A demonstration that cannot be shown in full (a missing value, a conversation
without an answer) is refused by name.

Shapes: K demonstrations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsort.curriculum.demos.budget import Messages
from sparsort.curriculum.demos.pool.leaks import Leak
from sparsort.curriculum.demos.pool.pool import input_fields, leaking_rows, only_field
from sparsort.curriculum.demos.pool.rows import Row, name_of
from sparsort.errors import SparsortError
from sparsort.scoring.data.inputs import TEXT_FIELD
from sparsort.scoring.prompts.conversations import Turn, conversation_fields, question_text, split_answer, turns_of
from sparsort.scoring.prompts.functions import PROMPT_COLUMN, PROMPT_TEMPLATE, PromptFunction
from sparsort.templates import render
from sparsort.values import is_missing, kind_of, missing_name, put, row_of


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The parts of a prompt.

    Attributes:
        texts: the K demonstrations as text.
        turns: the K demonstrations as chat turns.
        query: the query as text.
        query_turns: the query as chat turns.
        system: the text of the system turn, or of the first block of a plain prompt; None without one.
        leaks: the demonstrations that are the query itself or nearly so.
        are_turns: whether the blocks exist as turns only, so that the prompt must be chat turns.
    """

    texts: list[str]
    turns: list[Messages]
    query: str
    query_turns: Messages
    system: str | None
    leaks: list[Leak]
    are_turns: bool = False


def template_blocks(
    demos: Sequence[Row], query: Row | str, prompt: str, answer: str, system: str | None, *, find_leaks: bool
) -> Blocks:
    """The blocks that templates make. Spaces around an answer are removed in its chat turn.

    Raises:
        SparsortError: a field is missing, the query is bare text although the prompt has several fields, or an argument is not
            text.
    """
    for name, template in (("prompt", prompt), ("answer", answer)):
        if not isinstance(template, str):
            raise SparsortError(f"{name}= is a format string such as '{{{name}}}', not {_kind_of(template)}.")
    if is_missing(system):
        system = None
    elif not isinstance(system, str):
        raise SparsortError(f"system= is the text of an instruction, not {_kind_of(system)}.")
    if is_missing(query):
        raise SparsortError(f"the query is {_kind_of(query)}. Pass its text, or a row with its fields.")
    fields = input_fields(prompt)
    # Bare text is the value of the template's only field.
    query = query if isinstance(query, Mapping) else row_of({only_field(fields): query})
    names = [name_of(demo, position) for position, demo in enumerate(demos)]
    questions = [render(prompt, demo, where=name) for demo, name in zip(demos, names, strict=True)]
    answers = [render(answer, demo, where=name) for demo, name in zip(demos, names, strict=True)]
    query_text = render(prompt, query, where="the query")
    return Blocks(
        texts=[question + reply for question, reply in zip(questions, answers, strict=True)],
        # A chat template adds its own spaces, so those of a plain-text answer such as " {answer}" would be doubled.
        turns=[
            [{"role": "user", "content": question}, {"role": "assistant", "content": reply.strip()}]
            for question, reply in zip(questions, answers, strict=True)
        ],
        query=query_text,
        query_turns=[{"role": "user", "content": query_text}],
        system=system,
        leaks=leaking_rows(demos, query, fields) if find_leaks else [],
    )


def function_blocks(
    demos: Sequence[Row],
    query: Row | str,
    function: PromptFunction,
    answer: str,
    system: str | None,
    *,
    find_leaks: bool,
) -> Blocks:
    """The blocks whose questions a function writes, as text or as chat turns, each followed by the template of the answer.

    Raises:
        SparsortError: as `template_blocks` and `conversation_blocks`; or the function fails, or returns turns with a system turn
            although there is another one.
    """
    if not isinstance(query, Mapping):
        # Bare text is the value of the only field that the function reads.
        fields = input_fields(function, demos) or [TEXT_FIELD]
        query = row_of({only_field(fields): query})
    names = [name_of(demo, position) for position, demo in enumerate(demos)]
    questions = [function.write(demo, where=name) for demo, name in zip(demos, names, strict=True)]
    asked = function.write(query, where="the query")
    leaks = _leaks_by_function(demos, query, function, questions, asked) if find_leaks else []
    if not any(isinstance(question, list) for question in (*questions, asked)):
        rows = [{**demo, PROMPT_COLUMN: text} for demo, text in zip(demos, questions, strict=True)]
        asking = {**query, PROMPT_COLUMN: asked}
        blocks = template_blocks(rows, asking, PROMPT_TEMPLATE, answer, system, find_leaks=False)
        return replace(blocks, leaks=leaks)
    answers = [render(answer, demo, where=name).strip() for demo, name in zip(demos, names, strict=True)]
    rows = [
        {**demo, PROMPT_COLUMN: [*_as_turns(question), {"role": "assistant", "content": reply}]}
        for demo, question, reply in zip(demos, questions, answers, strict=True)
    ]
    blocks = conversation_blocks(rows, query_row(_as_turns(asked), PROMPT_COLUMN), PROMPT_COLUMN, find_leaks=False)
    if system is not None and blocks.system is not None:
        raise SparsortError(
            f"system= was given, and the turns of the prompt function {function.name} have a system turn. Pass one of the two."
        )
    return replace(blocks, system=blocks.system or system, leaks=leaks, are_turns=True)


def _leaks_by_function(
    demos: Sequence[Row],
    query: Row,
    function: PromptFunction,
    questions: Sequence[str | list[Turn] | None],
    asked: str | list[Turn] | None,
) -> list[Leak]:
    """The demonstrations that leak, by the columns that the function reads, or else by the questions that it writes."""
    if fields := input_fields(function, [query, *demos]):
        return leaking_rows(demos, query, fields)
    first, *texts = ({TEXT_FIELD: question_text(_as_turns(question))} for question in (asked, *questions))
    return leaking_rows(texts, first, [TEXT_FIELD])


def conversation_blocks(demos: Sequence[Row], query: Row | str, messages: str, *, find_leaks: bool) -> Blocks:
    """The blocks that are the rows' own conversations, each up to its last assistant turn.

    All system turns must agree, because the prompt has only one, at its beginning. Leaks are found by the text of the turns
    before the answer.

    Raises:
        SparsortError: a conversation cannot be read or has no answer, or the system turns differ.
    """
    row = query if isinstance(query, Mapping) else query_row(query, messages)
    conversations = [demo_turns(demo, messages, where=name_of(demo, position)) for position, demo in enumerate(demos)]
    question = _without_answer(turns_of(row, messages, where="the query"))
    all_turns = [turn for turns in (*conversations, question) for turn in turns]
    systems = list(dict.fromkeys(turn["content"] for turn in all_turns if turn["role"] == "system"))
    if len(systems) > 1:
        raise SparsortError(
            f"the conversations of one prompt have different system turns, such as {systems[0]!r} and {systems[1]!r}, and a "
            "prompt has one. Select demonstrations whose system turns agree with each other and with the query's."
        )
    # Only the turns before the answers are compared: two different questions may have the same answer.
    demo_texts = [{"text": question_text(split_answer(turns)[0])} for turns in conversations]
    query_text = question_text(question)
    return Blocks(
        texts=["\n".join(turn["content"] for turn in turns) for turns in conversations],
        turns=[_without_system(turns) for turns in conversations],
        query=query_text,
        query_turns=_without_system(question),
        system=systems[0] if systems else None,
        leaks=leaking_rows(demo_texts, {"text": query_text}, ["text"]) if find_leaks else [],
    )


def demo_turns(row: Row, messages: str, *, where: str) -> list[Turn]:
    """The turns of a demonstration, up to its answer: the last assistant turn.

    Raises:
        SparsortError: the row has no conversation, or one without an answer.
    """
    question, answer = split_answer(turns_of(row, messages, where=where))
    if answer is None or not answer.strip():
        raise SparsortError(
            f"{where} has no assistant turn in its conversation (messages={messages!r}), so it shows no answer. "
            "Remove the row."
        )
    return [*question, {"role": "assistant", "content": answer}]


def compared_text(row: Row, messages: str, *, where: str) -> str:
    """The text by which the conversation of a demonstration or of a query is compared and embedded.

    Raises:
        SparsortError: the conversation cannot be read.
    """
    return question_text(split_answer(turns_of(row, messages, where=where))[0])


def query_row(query: str | Sequence[Any], messages: str) -> dict[str, Any]:
    """A row whose conversation ends where its answer begins, from bare text, which becomes a user's turn, or from turns.

    Raises:
        SparsortError: a turn cannot be read.
    """
    first, *others = conversation_fields(messages)
    turns = [{"role": "user", "content": query}] if isinstance(query, str) else list(query)
    question = _without_answer(turns_of({"query": turns}, "query", where="the query"))
    # Without the empty assistant turn, an earlier assistant turn of the query would count as its answer.
    row = put({}, first, [*question, {"role": "assistant", "content": ""}])
    for field in others:
        row = put(row, field, None)
    return row


def _without_answer(turns: list[Turn]) -> list[Turn]:
    """The turns of a query without the answer that its row may contain."""
    question = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    if not any(turn["content"].strip() for turn in question):
        raise SparsortError(
            'the query has no turn with text. Pass its text, or turns such as [{"role": "user", "content": "…"}].'
        )
    return question


def _without_system(turns: list[Turn]) -> Messages:
    return [turn for turn in turns if turn["role"] != "system"]


def _as_turns(question: str | list[Turn] | None) -> list[Turn]:
    return question if isinstance(question, list) else [{"role": "user", "content": question or ""}]


def _kind_of(value: Any) -> str:
    return missing_name(value) if is_missing(value) else kind_of(value)
