"""How `sparsort order` reads its rows and its query: by templates over their columns, or as whole conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsort.curriculum.demos.blocks import compared_text, demo_turns, query_row
from sparsort.curriculum.demos.pool.pool import input_fields
from sparsort.errors import SparsortError
from sparsort.scoring.prompts.conversations import turns_of
from sparsort.scoring.prompts.functions import PromptFunction, function_of
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.prompts.spec import PromptSpec
from sparsort.storage.integrity import parse_json
from sparsort.templates import fields_of, render
from sparsort.values import row_of

if TYPE_CHECKING:
    from sparsort.scoring.data.rows import RowSource


@dataclass(frozen=True, kw_only=True)
class DemoText:
    """The templates of question and answer, or the column of the conversations.

    Attributes:
        prompt, answer: templates, or a function that writes the question; None with `messages`.
        messages: the column of whole conversations; None with templates.
        system: the system turn that precedes templates.
        chat: whether texts are put into the model's chat template; for conversations, and for a function that returns chat turns,
            it is always true.
    """

    prompt: str | PromptFunction | None
    answer: str | None
    messages: str | None
    system: str | None
    chat: bool

    @classmethod
    def of(cls, source: RowSource, spec: PromptSpec) -> DemoText:
        """Read the caller's prompt for these rows; without templates or a column, use the columns "question" and "answer".

        Raises:
            SparsortError: conversations and templates were given together, or neither and the data has no such columns.
        """
        if spec.messages is not None:
            spec.read()
            return cls(prompt=None, answer=None, messages=spec.messages, system=None, chat=True)
        columns = source.columns()
        prompt, answer, chat = function_of(spec.template) or spec.template, spec.answer, spec.chat
        if isinstance(prompt, PromptFunction):
            chat = chat or Prompt.of(prompt).for_rows(source).is_chat
        elif prompt is not None and not isinstance(prompt, str):
            raise SparsortError(
                f"the prompt is {prompt!r:.80}; demonstrations are put into a format string, such as "
                "'Question: {question}\nAnswer:' (with chat=True (--chat), the user's turn), or into what a function returns."
            )
        if prompt is None and "question" not in columns:
            raise SparsortError(
                "which columns make the prompt? Pass prompt='…' (--prompt) with columns in braces, or messages='…' "
                f"(--messages) with a column of conversations; this data has: {', '.join(columns)}."
            )
        if answer is None and "answer" not in columns:
            raise SparsortError(
                "which column is the answer? Pass answer='…' (--answer), for example ' {label}'; this data has: "
                f"{', '.join(columns)}."
            )
        prompt, answer = prompt or "Question: {question}\nAnswer:", answer or " {answer}"
        return cls(prompt=prompt, answer=answer, messages=None, system=spec.system, chat=chat)

    @property
    def kind(self) -> str:
        """The kind of prompt, as `PinnedDemos.kind`."""
        if self.messages is not None:
            return "conversation"
        return "chat" if self.chat else "plain"

    def read(self, *, answer: bool = False) -> Prompt:
        """The prompt by which the model reads a row, with or without its answer."""
        if self.messages is not None:
            return Prompt.of_messages(self.messages, answer=answer)
        prompt = self.prompt if isinstance(self.prompt, PromptFunction) else str(self.prompt)
        return Prompt.of(prompt, answer=self.answer if answer else None, system=self.system, chat=self.chat)

    def question(self, row: Mapping[str, Any], *, where: str) -> str:
        """The question of a row as text, without chat markers."""
        if self.messages is not None:
            return compared_text(row, self.messages, where=where)
        if isinstance(self.prompt, PromptFunction):
            return self.prompt.question(row, where=where)
        return render(str(self.prompt), row, where=where)

    def whole(self, row: Mapping[str, Any], *, where: str) -> str:
        """A demonstration as it will appear in the prompt, without chat markers."""
        if self.messages is not None:
            return "\n".join(turn["content"] for turn in demo_turns(row, self.messages, where=where))
        return self.question(row, where=where) + render(str(self.answer), row, where=where)

    def compared_by(self) -> dict[str, Any]:
        """The argument of `select_demos` that defines the text by which a query is compared."""
        if self.messages is not None:
            return {"text": lambda row: self.question(row, where="a row")}
        return {"prompt": self.prompt}

    def parse_query(self, query: str | Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The query as a row.

        Args:
            query: the query.
            rows: the demonstrations, which show the fields that a prompt function reads.

        Raises:
            SparsortError: it is empty, broken JSON, or bare text for several columns.
        """
        value = _parse_json(query) if isinstance(query, str) else query
        if isinstance(value, Mapping) and self.messages is not None:
            return {**value, **query_row(turns_of(value, self.messages, where="the query"), self.messages)}
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, str) and not value.strip():
            raise SparsortError("the query is empty. Pass its text, or a JSON object with the prompt's columns.")
        if self.messages is not None:
            return query_row(value, self.messages)
        is_template = not isinstance(self.prompt, PromptFunction)
        names = (
            input_fields(self.prompt, rows) if isinstance(self.prompt, PromptFunction) else fields_of(str(self.prompt))
        )
        if not names:
            raise SparsortError(
                "the prompt function does not read the same column of text from every row, so the query must be a row."
            )
        if len(names) != 1:
            example = json.dumps(row_of(dict.fromkeys(names, "…")), ensure_ascii=False)
            raise SparsortError(
                f"the prompt has the columns {', '.join(names)}, so the query must be a row (--query with a JSON object), "
                f"such as: {example}." + (" Write literal braces twice: {{ and }}." if is_template else "")
            )
        return row_of({names[0]: str(query)})


def _parse_json(query: str) -> Any:
    """The JSON object or array that a query consists of; any other query as it is."""
    opening = query.lstrip()[:1]
    if opening not in ("{", "["):
        return query
    try:
        return parse_json(query)
    except json.JSONDecodeError as error:
        # A text may begin with a bracket, such as a citation; one that begins with a brace is hardly ever meant as text.
        if opening == "[":
            return query
        raise SparsortError(
            f"the query looks like JSON but is not valid JSON: {error}. Quote it for your shell."
        ) from None
