"""From a row to token ids. A prompt is a format string, chat turns, the conversation in a column, or written by a function.

Contract: `Prompt.render` makes the text, and `Encoder.encode` the ids. Prompt and answer are tokenised together, so the ids are
those that the model would see; a token that straddles the border belongs to the answer. This holds for the answer of a row, whose
states and loss are read. Labels that are compared are scored by the rule in `token_tree`, which gives other tokens only if
whitespace ends the prompt or a token before the border changes. The ids begin with the special tokens that the tokenizer puts
before a text (once). No special tokens are appended, so that the last token belongs to the text. A row that cannot be encoded is
returned with a `problem`; a mistake in the template, or a value that is not text, raises an error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from sparsort.errors import SparsortError, unknown_choice
from sparsort.paths import column_of, spell
from sparsort.scoring.prompts.chat_templates import RefusedTurnsError, apply_chat_template, need_chat_template
from sparsort.scoring.prompts.conversations import conversation_columns, split_answer, turns_of
from sparsort.scoring.prompts.functions import PromptFunction, function_of
from sparsort.scoring.prompts.types import PromptWriter, Truncation, Turns
from sparsort.templates import check_values, columns_of, fields_of, render
from sparsort.values import is_list, is_missing, kind_of, missing_name, value_at

if TYPE_CHECKING:
    from sparsort.scoring.data.rows import RowSource

_ROLES = ("system", "user", "assistant")
# The role of the only turn of a prompt whose conversations are in a column. The template of that turn is the column.
_MESSAGES = "messages"
# The answer of such a prompt, which is not a format string.
LAST_ASSISTANT = "last assistant turn"
_SYSTEM_WITHOUT_CHAT = "a system turn was given with a plain prompt. Pass chat=True (--chat) to use the chat template."
_USE_MESSAGES = "A column of conversations is read with messages= (--messages)."


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """One row as text.

    Attributes:
        text: prompt and answer.
        answer_start: the character at which the answer starts.
        problem: `(status, reason)` if the row has no text to score, otherwise None.
    """

    text: str
    answer_start: int
    problem: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One row as token ids.

    Attributes:
        ids: token ids, including the leading special tokens.
        n_lead: number of leading special tokens of the tokenizer (0 or 1 for most).
        answer_start: index of the first token of the answer; `len(ids)` without an answer.
        n_dropped: number of tokens that truncation removed.
        problem: `(status, reason)` if the row cannot be scored, otherwise None.
    """

    ids: list[int]
    n_lead: int
    answer_start: int
    n_dropped: int = 0
    problem: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The text of a row that the model reads.

    Attributes:
        turns: `(role, template)` pairs. A single pair with the role "text" is a plain format string. A single pair with the role
            "messages" is the column of whole conversations. With a function, the last template is its description.
        answer: format string of the answer after the prompt; None to score the prompt alone; `LAST_ASSISTANT` for a
            conversation.
        function: the function that writes the last turn, or several turns in its place; None if templates make the prompt.
    """

    turns: tuple[tuple[str, str], ...]
    answer: str | None = None
    function: PromptFunction | None = None

    @classmethod
    def of(
        cls,
        prompt: str | Turns | PromptWriter,
        *,
        answer: str | None = None,
        system: str | None = None,
        chat: bool = False,
    ) -> Prompt:
        """Build a prompt from templates.

        Args:
            prompt: a format string such as `"Question: {question}\\nAnswer:"`; chat turns
                `[{"role": "user", "content": "{question}"}, …]`, which imply `chat`; or a function from a row to its text or chat
                turns, for which `for_rows` finds out whether it implies `chat`.
            answer: format string of the answer. It is appended to the prompt without a separator, so begin it with a space if
                one is needed.
            system: template of the system turn; only with chat.
            chat: put `prompt` into the model's chat template as the user's turn.

        Raises:
            SparsortError: no template has a field, a role is unknown, there is a system turn without chat, or a template is not
                text.
        """
        function = function_of(prompt)
        if function is not None or isinstance(prompt, str):
            turns = [("user" if chat else "text", str(prompt) if function is None else function.description)]
        else:
            turns = _templates_of(prompt)
            for role, _ in turns:
                if role not in _ROLES:
                    raise unknown_choice("role", role, _ROLES)
        if not is_missing(system):
            # Whether the prompt of a function is plain is not known yet.
            if turns[0][0] == "text" and function is None:
                raise SparsortError(_SYSTEM_WITHOUT_CHAT)
            turns.insert(0, ("system", _template(system, "system")))
        if not is_missing(answer):
            _template(answer, "answer")
        if function is None and not any(fields_of(template) for _, template in turns):
            last_template = turns[-1][1] if turns else ""
            raise SparsortError(
                f"the prompt {last_template!r} uses no field of the data, so all rows would have the same score. "
                "Put a column name in braces, for example 'Question: {question}\\nAnswer:'."
            )
        return cls(turns=tuple(turns), answer=None if is_missing(answer) else answer, function=function)

    @classmethod
    def of_messages(cls, messages: str, *, answer: bool = True) -> Prompt:
        """A prompt that reads the conversation in a column, in the model's chat template.

        Args:
            messages: the column of the conversations; see `sparsort.scoring.prompts.conversations`.
            answer: whether the last assistant turn is the answer; if False, the prompt alone is read.

        Raises:
            SparsortError: `messages` names no column.
        """
        conversation_columns(messages)
        return cls(turns=((_MESSAGES, messages),), answer=LAST_ASSISTANT if answer else None)

    @classmethod
    def given(
        cls,
        prompt: str | Turns | PromptWriter | Prompt | None,
        *,
        messages: str | None = None,
        answer: str | None = None,
        system: str | None = None,
        chat: bool = False,
    ) -> Prompt | None:
        """The prompt that a caller described by templates, by a column of conversations or by a `Prompt`; None for no prompt.

        Raises:
            SparsortError: see `of`; or a column of conversations was given together with templates.
        """
        templates = {"prompt": prompt if messages is not None else None, "answer": answer, "system": system}
        conflict = next((name for name, value in templates.items() if value is not None), None)
        if messages is not None:
            if conflict is not None:
                raise SparsortError(
                    f"messages={messages!r} (--messages) and {conflict} were given. A conversation has its own "
                    "turns, and its last assistant turn is the answer. Pass one of the two."
                )
            return cls.of_messages(messages)
        if isinstance(prompt, Prompt):
            if conflict is not None:
                raise SparsortError(f"the prompt is a Prompt, which has its own {conflict}. Do not pass {conflict}=.")
            return prompt
        return None if prompt is None else cls.of(prompt, answer=answer, system=system, chat=chat)

    @property
    def messages(self) -> str | None:
        """The column of the conversations; None if the prompt consists of templates."""
        return self.turns[0][1] if self.turns[0][0] == _MESSAGES else None

    @property
    def is_chat(self) -> bool:
        """Whether the model's chat template is applied."""
        return self.turns[-1][0] != "text"

    @property
    def fields(self) -> list[str]:
        """The columns that the prompt reads, in the order of the templates."""
        if self.messages is not None:
            return conversation_columns(self.messages)
        return list(dict.fromkeys(column for template in self._templates for column in columns_of(template)))

    @property
    def content(self) -> list[str] | None:
        """The columns that determine the text of a row; None if any column may, because a function writes the text."""
        return self.fields if self.function is None else None

    @property
    def _turn_templates(self) -> tuple[tuple[str, str], ...]:
        """The (role, template) pairs, without the turn that a function writes."""
        return self.turns if self.function is None else self.turns[:-1]

    @property
    def _templates(self) -> list[str]:
        return [template for _, template in self._turn_templates] + ([self.answer] if self.answer else [])

    @property
    def paths(self) -> set[str]:
        """The fields that are paths into a column. A schema does not show whether a path leads to a value."""
        if self.messages is not None:
            return set()
        return {
            field for template in self._templates for field in fields_of(template) if field != spell([column_of(field)])
        }

    @property
    def is_uniform(self) -> bool:
        """Whether checking one row of a table is enough. Conversations and functions may fail for any row."""
        return self.messages is None and self.function is None

    def for_rows(self, source: RowSource) -> Prompt:
        """The prompt for these rows. A function implies `chat` if it returns chat turns for the first row that has a prompt.

        Raises:
            SparsortError: the function failed, or it returns text although there is a system turn.
        """
        if self.function is None or self.is_chat:
            return self
        *others, (_, description) = self.turns
        if self.function.returns_turns(source):
            return replace(self, turns=(*others, ("user", description)))
        if others:
            raise SparsortError(_SYSTEM_WITHOUT_CHAT)
        return self

    def check(self, fields: Mapping[str, Any], *, where: str) -> set[str]:
        """Check that the prompt can read a row, without rendering it.

        Returns:
            The fields that are missing in this row.

        Raises:
            SparsortError: see `render`.
        """
        if self.messages is not None:
            return set() if turns_of(fields, self.messages, where=where) else {self.messages}
        if self.function is not None:
            self.function.turns(fields, self.turns[-1][0], where=where)
        missing = (check_values(template, fields, where=where, way_out=_USE_MESSAGES) for template in self._templates)
        return set().union(*missing)

    def describe(self) -> dict[str, Any]:
        """The prompt as provenance."""
        return {"turns": [list(turn) for turn in self.turns], "answer": self.answer}

    def render(self, fields: Mapping[str, Any], *, where: str, tokenizer: Any = None) -> Rendered:
        """The text of one row.

        Args:
            fields: the row.
            where: the name of the row in error messages, such as "row 7 (id 'q7')".
            tokenizer: needed only for chat turns.

        Raises:
            SparsortError: a column does not exist, a function failed, or the model has no chat template.
        """
        if self.messages is not None:
            return self._render_messages(fields, where, tokenizer)
        written = None if self.function is None else self.function.turns(fields, self.turns[-1][0], where=where)
        values = [
            value_at(fields, name, where=where) for _, template in self._turn_templates for name in fields_of(template)
        ]
        answer_fields = fields_of(self.answer) if self.answer else []
        no_answer = any(is_missing(value_at(fields, field, where=where)) for field in answer_fields)
        # A missing value is a property of this row and not a mistake in the call, so the row is kept, without a score.
        if (
            no_answer
            or any(map(is_missing, values))
            or (self.function is None and all(isinstance(value, str) and not value.strip() for value in values))
        ):
            return _without_text("empty", "the fields of the prompt are empty or null")
        if written == []:
            return _without_text("empty", "the prompt function returned no text")
        filled = [(role, render(template, fields, where=where)) for role, template in self._turn_templates]
        filled += written or []
        try:
            text = apply_chat_template(tokenizer, filled) if self.is_chat else filled[0][1]
        except RefusedTurnsError as error:
            if self.function is None:
                raise
            # A function may return other turns for each row, so this is a problem of the row and not of the call.
            return _without_text("invalid", str(error))
        answer = render(self.answer, fields, where=where) if self.answer is not None else ""
        return _rendered(text, answer)

    def _render_messages(self, fields: Mapping[str, Any], where: str, tokenizer: Any) -> Rendered:
        need_chat_template(tokenizer)
        turns = turns_of(fields, str(self.messages), where=where)
        prompt_turns, answer = split_answer(turns)
        if not turns:
            return _without_text("empty", "the conversation is empty or null, or one of its turns has no content")
        if not any(turn["content"].strip() for turn in prompt_turns):
            return _without_text("empty", "the conversation has no turn with text before its answer")
        if self.answer is not None and answer is None:
            return _without_text("empty", "the conversation has no assistant turn")
        try:
            text = apply_chat_template(tokenizer, [(turn["role"], turn["content"]) for turn in prompt_turns])
        except RefusedTurnsError as error:
            # The turns come from the row, so this is a problem of the row and not of the call.
            return _without_text("invalid", str(error))
        return _rendered(text, answer if self.answer is not None and answer is not None else "")


def _templates_of(prompt: Any) -> list[tuple[str, str]]:
    """The `(role, template)` pairs of chat turns."""
    if not is_list(prompt) or not all(isinstance(turn, Mapping) for turn in prompt):
        raise SparsortError(
            f"the prompt is {prompt!r:.80}; expected a format string such as 'Question: {{question}}\\nAnswer:', chat turns "
            'such as [{"role": "user", "content": "{question}"}], or a function from a row to one of them.'
        )
    return [(str(turn.get("role")), _template(turn.get("content"), "content")) for turn in prompt]


def _template(value: Any, name: str) -> str:
    if not isinstance(value, str):
        kind = missing_name(value) if is_missing(value) else kind_of(value)
        raise SparsortError(f"{name} is {kind}; expected a format string such as '{{{name}}}'.")
    return value


def _rendered(text: str, answer: str) -> Rendered:
    # JSON can contain half of a surrogate pair. It cannot be encoded as UTF-8, so fast tokenizers refuse it.
    if any("\ud800" <= letter <= "\udfff" for letter in text + answer):
        return _without_text("invalid", "the text contains half of a surrogate pair, which is not a character")
    return Rendered(text=text + answer, answer_start=len(text))


def _without_text(status: str, reason: str) -> Rendered:
    return Rendered(text="", answer_start=0, problem=(status, reason))


class Encoder:
    """Converts rendered rows to token ids under a length limit.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: the largest number of tokens of a row; None for no limit.
        truncation: treatment of longer rows. "error" leaves a row unscored with a reason. "left" and "right" cut that end of the
            prompt (never the answer or the leading special tokens), and count the tokens that were cut.
        chat: the text comes from a chat template, which has already inserted the special tokens.
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
        """Encode rows, and return them in the same order."""
        if not rendered:
            return []
        # The tokenizer may refuse the text of a row with a problem, so such a row is encoded as an empty text.
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
                # The first token that extends past the border begins the answer, even if it starts before the border. Slow
                # tokenizers give no offsets; there, the prompt is tokenised alone and the common tokens are counted.
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
        """Count the tokens of one text, including the leading special tokens."""
        return len(self.encode([Rendered(text=text, answer_start=len(text))])[0].ids)

    def _finish(self, item: Rendered, ids: list[int], start: int) -> Encoded:
        # A plain text may begin with the special tokens already, for example "<bos>". They are not inserted twice.
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
        # "right" cuts the end of the prompt, which is directly before the answer.
        cut = slice(n_lead, n_lead + over) if self.truncation == "left" else slice(start - over, start)
        del ids[cut]
        return Encoded(ids=ids, n_lead=n_lead, answer_start=start - over, n_dropped=over)


def check_truncation(truncation: str) -> None:
    """Refuse a name that is not in `Truncation`."""
    if truncation not in get_args(Truncation):
        raise unknown_choice("truncation", truncation, get_args(Truncation))


def hash_tokenizer(tokenizer: Any, *, chat: bool = False) -> str:
    """The SHA-256 of everything that determines the tokens of a text; with `chat`, this includes the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    template = getattr(tokenizer, "chat_template", None) if chat else None
    # Some templates insert the date. A text that they render is therefore hashed as well.
    example = apply_chat_template(tokenizer, [("user", "x")]) if isinstance(template, str) else ""
    return f"sha256:{hashlib.sha256((body + json.dumps(template) + example).encode()).hexdigest()}"


def identify_tokenizer(tokenizer: Any, *, chat: bool, recorded: str | None = None) -> str:
    """The hash of a tokenizer, in the form in which a file recorded it.

    Args:
        tokenizer: the tokenizer.
        chat: whether its chat template is used.
        recorded: the hash in a file that is to be compared or continued; None for no file. Version 0.1.0 included the chat
            template even if it was not used. If `recorded` is that hash of this tokenizer, it is returned.

    Raises:
        SparsortError: `chat` is true, and the template cannot be rendered.
    """
    current = hash_tokenizer(tokenizer, chat=chat)
    if recorded in (None, current):
        return current
    return recorded if earlier_hash(tokenizer, chat=chat) == recorded else current


def earlier_hash(tokenizer: Any, *, chat: bool) -> str | None:
    """The hash of version 0.1.0, which included the chat template even for plain prompts; None if it is the current hash."""
    if chat or not getattr(tokenizer, "chat_template", None):
        return None
    try:
        return hash_tokenizer(tokenizer, chat=True)
    except SparsortError:
        return None


def leading_specials(tokenizer: Any) -> list[int]:
    """The special tokens that this tokenizer puts before a text; those that it appends are not returned."""
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    # Tokenizers add special tokens by many rules, so the leading ones are found by encoding a text with and without them.
    for start in range(len(full) - len(body) + 1):
        if full[start : start + len(body)] == body:
            return list(full[:start])
    return []


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
