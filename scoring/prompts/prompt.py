"""From a row to token ids: a prompt is a format string, chat turns, or a conversation that the row holds.

Contract: `Prompt.render` makes text, `Encoder.encode` makes ids. The text is tokenised once, prompt and answer together, so
the ids are those the model would see; a token that straddles the border belongs to the answer. This holds for a row's
own answer, whose states and loss are read. Labels that are compared are scored by the rule in `token_tree`, which gives other
tokens only where whitespace ends the prompt or a token before the border changes. Exactly the special tokens
that the tokenizer puts in front are put in front (once), and none behind, so that the last token is the text's own.
A row that cannot be encoded is returned with a `problem`; a mistake in the template, or a value that is not text, raises.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from sparsort.errors import SparsortError, unknown_choice
from sparsort.paths import column_of, spell
from sparsort.scoring.prompts.chat_templates import RefusedTurnsError, apply_chat_template, need_chat_template
from sparsort.scoring.prompts.conversations import conversation_columns, split_answer, turns_of
from sparsort.scoring.prompts.types import Truncation, Turns
from sparsort.templates import check_values, columns_of, fields_of, render
from sparsort.values import is_list, is_missing, kind_of, missing_name, value_at

_ROLES = ("system", "user", "assistant")
# The role of the one turn of a prompt that is a conversation: its template is the name of the column.
_MESSAGES = "messages"
# The answer of such a prompt; no format string.
LAST_ASSISTANT = "last assistant turn"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """One row as text.

    Attributes:
        text: prompt and answer.
        answer_start: the character at which the answer starts.
        problem: `(status, reason)` of a row that has no text to score, else None.
    """

    text: str
    answer_start: int
    problem: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One row as token ids.

    Attributes:
        ids: token ids, special tokens in front included.
        n_lead: how many of them are the tokenizer's own special tokens in front (0 or 1 for most).
        answer_start: index of the answer's first token; `len(ids)` without an answer.
        n_dropped: tokens that truncation took away.
        problem: `(status, reason)` of a row that cannot be scored, else None.
    """

    ids: list[int]
    n_lead: int
    answer_start: int
    n_dropped: int = 0
    problem: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model reads of a row.

    Attributes:
        turns: `(role, template)` pairs; one pair with the role "text" is a plain format string, one with the role "messages" is
            the name of the column that holds whole conversations.
        answer: format string of the answer that follows the prompt, or None to score the prompt alone; `LAST_ASSISTANT` for
            a conversation.
    """

    turns: tuple[tuple[str, str], ...]
    answer: str | None = None

    @classmethod
    def of(
        cls, prompt: str | Turns, *, answer: str | None = None, system: str | None = None, chat: bool = False
    ) -> Prompt:
        """Build a prompt from what a user passes.

        Args:
            prompt: a format string such as `"Question: {question}\\nAnswer:"`, or chat turns
                `[{"role": "user", "content": "{question}"}, …]`, which imply `chat`.
            answer: format string of the answer, joined to the prompt as it stands (begin it with a space where one belongs).
            system: the system turn's template; chat only.
            chat: put `prompt` into the model's chat template as the user's turn.

        Raises:
            SparsortError: no field in any template, an unknown role, a system turn without chat, a template that is no text.
        """
        if isinstance(prompt, str):
            turns = [("user" if chat else "text", prompt)]
        else:
            turns = _turn_templates(prompt)
            for role, _ in turns:
                if role not in _ROLES:
                    raise unknown_choice("role", role, _ROLES)
        if not is_missing(system):
            if turns[0][0] == "text":
                raise SparsortError(
                    "a system turn was given with a plain prompt. Pass chat=True (--chat) to use the chat template."
                )
            turns.insert(0, ("system", _template(system, "system")))
        if not is_missing(answer):
            _template(answer, "answer")
        if not any(fields_of(template) for _, template in turns):
            shown = turns[-1][1] if turns else ""
            raise SparsortError(
                f"the prompt {shown!r} uses no field of the data, so every row would score alike. "
                "Put a column name in braces, for example 'Question: {question}\\nAnswer:'."
            )
        return cls(turns=tuple(turns), answer=None if is_missing(answer) else answer)

    @classmethod
    def of_messages(cls, messages: str, *, answer: bool = True) -> Prompt:
        """A prompt that is the conversation which each row holds, in the model's chat template.

        Args:
            messages: the column of the conversations; see `sparsort.scoring.prompts.conversations`.
            answer: read the last assistant turn as the answer; False to read the prompt alone.

        Raises:
            SparsortError: `messages` names no column.
        """
        conversation_columns(messages)
        return cls(turns=((_MESSAGES, messages),), answer=LAST_ASSISTANT if answer else None)

    @classmethod
    def given(
        cls,
        prompt: str | Turns | Prompt | None,
        *,
        messages: str | None = None,
        answer: str | None = None,
        system: str | None = None,
        chat: bool = False,
    ) -> Prompt | None:
        """The prompt that a caller described in one of the ways there are, or None.

        Raises:
            SparsortError: as `of`; or a conversation was given together with templates.
        """
        others = {"prompt": prompt if messages is not None else None, "answer": answer, "system": system}
        taken = next((name for name, value in others.items() if value is not None), None)
        if messages is not None:
            if taken is not None:
                raise SparsortError(
                    f"messages={messages!r} (--messages) and {taken} were given. A conversation brings its own "
                    "turns, and its last assistant turn is the answer. Pass one of the two."
                )
            return cls.of_messages(messages)
        if isinstance(prompt, Prompt):
            if taken is not None:
                raise SparsortError(f"the prompt is a Prompt, which has its own {taken}. Leave {taken}= out.")
            return prompt
        return None if prompt is None else cls.of(prompt, answer=answer, system=system, chat=chat)

    @property
    def messages(self) -> str | None:
        """The column of the conversations, where the prompt is one that each row holds."""
        return self.turns[0][1] if self.turns[0][0] == _MESSAGES else None

    @property
    def is_chat(self) -> bool:
        """Whether the model's chat template is applied."""
        return self.turns[0][0] != "text"

    @property
    def fields(self) -> list[str]:
        """The columns that the prompt reads, in order of appearance."""
        if self.messages is not None:
            return conversation_columns(self.messages)
        return list(dict.fromkeys(column for template in self._templates for column in columns_of(template)))

    @property
    def _templates(self) -> list[str]:
        return [template for _, template in self.turns] + ([self.answer] if self.answer else [])

    @property
    def paths(self) -> set[str]:
        """The fields that are paths into a column; a schema does not show whether they lead to a value."""
        if self.messages is not None:
            return set()
        return {
            field for template in self._templates for field in fields_of(template) if field != spell([column_of(field)])
        }

    @property
    def is_uniform(self) -> bool:
        """Whether one row of a table shows that all rows can be read; conversations differ from row to row."""
        return self.messages is None

    def check(self, fields: Mapping[str, Any], *, where: str) -> set[str]:
        """Refuse a row that the prompt cannot read, without rendering it.

        Returns:
            The fields that are missing in this row.

        Raises:
            SparsortError: as `render`.
        """
        if self.messages is not None:
            return set() if turns_of(fields, self.messages, where=where) else {self.messages}
        found = (check_values(template, fields, where=where, way_out=_WAY_OUT) for template in self._templates)
        return set().union(*found)

    def describe(self) -> dict[str, Any]:
        """The prompt as provenance."""
        return {"turns": [list(turn) for turn in self.turns], "answer": self.answer}

    def render(self, fields: Mapping[str, Any], *, where: str, tokenizer: Any = None) -> Rendered:
        """Fill the templates with one row's fields.

        Args:
            fields: the row.
            where: how to name the row in an error ("row 7 (id 'q7')").
            tokenizer: needed for chat turns only.

        Raises:
            SparsortError: a field is missing, or the model has no chat template.
        """
        if self.messages is not None:
            return self._render_messages(fields, where, tokenizer)
        asked = [field for _, template in self.turns for field in fields_of(template)]
        values = [value_at(fields, field, where=where) for field in asked]
        answers = fields_of(self.answer) if self.answer else []
        lacking = any(is_missing(value_at(fields, field, where=where)) for field in answers)
        # A missing value is a row's own lack, not a mistake in the call: the row stays, without a score.
        if (
            lacking
            or any(map(is_missing, values))
            or all(isinstance(value, str) and not value.strip() for value in values)
        ):
            return _without_text("empty", "the fields of the prompt are empty or null")
        filled = [(role, render(template, fields, where=where)) for role, template in self.turns]
        text = apply_chat_template(tokenizer, filled) if self.is_chat else filled[0][1]
        answer = render(self.answer, fields, where=where) if self.answer is not None else ""
        return _rendered(text, answer)

    def _render_messages(self, fields: Mapping[str, Any], where: str, tokenizer: Any) -> Rendered:
        need_chat_template(tokenizer)
        turns = turns_of(fields, str(self.messages), where=where)
        asked, answer = split_answer(turns)
        if not turns:
            return _without_text("empty", "the conversation is empty or null, or a turn of it has no content")
        if not any(turn["content"].strip() for turn in asked):
            return _without_text("empty", "the conversation has no turn with text before its answer")
        if self.answer is not None and answer is None:
            return _without_text("empty", "the conversation has no assistant turn")
        try:
            text = apply_chat_template(tokenizer, [(turn["role"], turn["content"]) for turn in asked])
        except RefusedTurnsError as error:
            # The turns are the row's own, so it is the row that cannot be read.
            return _without_text("invalid", str(error))
        return _rendered(text, answer if self.answer is not None and answer is not None else "")


def _turn_templates(prompt: Any) -> list[tuple[str, str]]:
    """The `(role, template)` pairs of chat turns."""
    if not is_list(prompt) or not all(isinstance(turn, Mapping) for turn in prompt):
        raise SparsortError(
            f"the prompt is {prompt!r:.80}; expected a format string such as 'Question: {{question}}\\nAnswer:', or chat turns "
            'such as [{"role": "user", "content": "{question}"}].'
        )
    return [(str(turn.get("role")), _template(turn.get("content"), "content")) for turn in prompt]


def _template(value: Any, name: str) -> str:
    if not isinstance(value, str):
        what = missing_name(value) if is_missing(value) else kind_of(value)
        raise SparsortError(f"{name} is {what}; expected a format string such as '{{{name}}}'.")
    return value


_WAY_OUT = "A column of conversations is read with messages= (--messages)."


def _rendered(text: str, answer: str) -> Rendered:
    if any("\ud800" <= letter <= "\udfff" for letter in text + answer):
        return _without_text("invalid", "the text holds half of a surrogate pair, which is no character")
    return Rendered(text=text + answer, answer_start=len(text))


def _without_text(status: str, reason: str) -> Rendered:
    return Rendered(text="", answer_start=0, problem=(status, reason))


class Encoder:
    """Turns rendered rows into token ids under a length limit.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: most tokens of a row; None for no limit.
        truncation: what happens to a longer row: "error" leaves it unscored with a reason, "left" and "right" cut that
            end of the prompt (never the answer, never the special tokens in front) and count what was cut.
        chat: the text comes from a chat template, which has put its special tokens itself.
    """

    def __init__(
        self, tokenizer: Any, *, max_length: int | None, truncation: Truncation = "error", chat: bool = False
    ) -> None:
        check_truncation(truncation)
        if chat and truncation != "error":
            raise SparsortError(
                f"truncation {truncation!r} would cut the markers of the chat template. Shorten the columns instead, "
                "or use a plain prompt."
            )
        if max_length is not None and max_length < 1:
            raise SparsortError(f"max_length is {max_length}; it must be at least 1 token.")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncation = truncation
        self._lead = leading_specials(tokenizer)
        self._prepend = not chat

    def encode(self, rendered: Sequence[Rendered]) -> list[Encoded]:
        """Token ids of every row, in order."""
        if not rendered:
            return []
        # A text that cannot be scored may be one that the tokenizer cannot read either.
        rendered = [item if item.problem is None else replace(item, text="", answer_start=0) for item in rendered]
        texts = [item.text for item in rendered]
        fast = bool(getattr(self.tokenizer, "is_fast", False))
        has_answer = any(item.answer_start < len(item.text) for item in rendered)
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=fast and has_answer,
            verbose=False,
        )
        encoded = []
        for number, item in enumerate(rendered):
            ids = list(batch["input_ids"][number])
            start = len(ids)
            if item.answer_start < len(item.text):
                if fast:
                    offsets = batch["offset_mapping"][number]
                    start = next((i for i, (_, end) in enumerate(offsets) if end > item.answer_start), len(ids))
                else:
                    head = self.tokenizer(item.text[: item.answer_start], add_special_tokens=False, verbose=False)[
                        "input_ids"
                    ]
                    start = _common_prefix(ids, head)
            encoded.append(self._finish(item, ids, start))
        return encoded

    def count(self, text: str) -> int:
        """Tokens of one text, special tokens in front included."""
        return len(self.encode([Rendered(text=text, answer_start=len(text))])[0].ids)

    def _finish(self, item: Rendered, ids: list[int], start: int) -> Encoded:
        has_lead = bool(self._lead) and ids[: len(self._lead)] == self._lead
        lead = [] if has_lead or not self._prepend else self._lead
        ids, start = lead + ids, start + len(lead)
        n_lead = len(self._lead) if has_lead or lead else 0
        if item.problem is not None or len(ids) == n_lead:
            problem = item.problem or ("empty", "the text has no tokens")
            return Encoded(ids=ids, n_lead=n_lead, answer_start=start, problem=problem)
        limit = self.max_length
        if limit is None or len(ids) <= limit:
            return Encoded(ids=ids, n_lead=n_lead, answer_start=start)
        over = len(ids) - limit
        if self.truncation == "error":
            reason = f"{len(ids)} tokens, the limit is {limit}; pass truncation 'left' or 'right' to cut"
            return Encoded(ids=ids, n_lead=n_lead, answer_start=start, problem=("too_long", reason))
        if start - n_lead <= over and start < len(ids):
            reason = f"the answer's {len(ids) - start} tokens leave no room for the prompt under the limit of {limit}"
            return Encoded(ids=ids, n_lead=n_lead, answer_start=start, problem=("too_long", reason))
        cut = slice(n_lead, n_lead + over) if self.truncation == "left" else slice(start - over, start)
        del ids[cut]
        return Encoded(ids=ids, n_lead=n_lead, answer_start=start - over, n_dropped=over)


def check_truncation(truncation: str) -> None:
    """Refuse a name that is none of `Truncation`."""
    if truncation not in get_args(Truncation):
        raise unknown_choice("truncation", truncation, get_args(Truncation))


def hash_tokenizer(tokenizer: Any, *, chat: bool = False) -> str:
    """SHA-256 of what decides the tokens of a text; with `chat` also of the chat template, as it renders today."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    template = getattr(tokenizer, "chat_template", None) if chat else None
    # Some templates insert the date: what they render is part of what is scored.
    shown = apply_chat_template(tokenizer, [("user", "x")]) if isinstance(template, str) else ""
    return f"sha256:{hashlib.sha256((body + json.dumps(template) + shown).encode()).hexdigest()}"


def identify_tokenizer(tokenizer: Any, *, chat: bool, recorded: str | None = None) -> str:
    """The hash of a tokenizer, in the form in which a file recorded it.

    Args:
        tokenizer: the tokenizer.
        chat: whether its chat template is used.
        recorded: the hash in a file that is to be compared or continued, or None. Version 0.1.0 included the chat template even
            where it was not used. If that is the hash of this tokenizer, it is returned.

    Raises:
        SparsortError: `chat`, and the template cannot be rendered.
    """
    found = hash_tokenizer(tokenizer, chat=chat)
    if recorded in (None, found):
        return found
    return recorded if earlier_hash(tokenizer, chat=chat) == recorded else found


def earlier_hash(tokenizer: Any, *, chat: bool) -> str | None:
    """The hash of version 0.1.0, which included the chat template of plain prompts; None where it is not another one."""
    if chat or not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return hash_tokenizer(tokenizer, chat=True)
    except SparsortError:
        return None


def leading_specials(tokenizer: Any) -> list[int]:
    """The special tokens that this tokenizer puts in front of a text (those it puts behind are left out)."""
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(body) + 1):
        if full[start : start + len(body)] == body:
            return list(full[:start])
    return []


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
