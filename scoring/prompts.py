"""From a row to token ids: a prompt is a format string or chat turns, with or without the answer behind it.

Contract: `Prompt.render` makes text, `Encoder.encode` makes ids. The text is tokenised once, prompt and answer together, so
the ids are those the model would see; a token that straddles the border belongs to the answer. (A row's own answer is meant,
whose states and loss are read. Labels that are compared are scored by the rule in `branches`, which gives the same tokens but
where whitespace ends the prompt or a token before the border changes.) Exactly the special tokens
that the tokenizer puts in front are put in front (once), and none behind, so that the last token is the text's own.
A row that cannot be encoded is returned with a `problem`; only a mistake in the template raises.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from sparsort.errors import SparsortError, unknown_choice
from sparsort.templates import fields_of, render

Truncation = Literal["error", "left", "right"]
Turns = Sequence[Mapping[str, str]]

_ROLES = ("system", "user", "assistant")


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
        turns: `(role, template)` pairs; one pair with the role "text" is a plain format string.
        answer: format string of the answer that follows the prompt, or None to score the prompt alone.
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
            SparsortError: no field in any template, an unknown role, a system turn without chat.
        """
        if isinstance(prompt, str):
            turns = [("user" if chat else "text", prompt)]
        else:
            turns = [(str(turn.get("role")), str(turn.get("content"))) for turn in prompt]
            for role, _ in turns:
                if role not in _ROLES:
                    raise unknown_choice("role", role, _ROLES)
        if system is not None:
            if turns[0][0] == "text":
                raise SparsortError(
                    "a system turn was given with a plain prompt. Pass chat=True (--chat) to use the chat template."
                )
            turns.insert(0, ("system", system))
        if not any(fields_of(template) for _, template in turns):
            shown = turns[-1][1] if turns else ""
            raise SparsortError(
                f"the prompt {shown!r} uses no field of the data, so every row would score alike. "
                "Put a column name in braces, for example 'Question: {question}\\nAnswer:'."
            )
        return cls(turns=tuple(turns), answer=answer)

    @property
    def is_chat(self) -> bool:
        """Whether the model's chat template is applied."""
        return self.turns[0][0] != "text"

    @property
    def fields(self) -> list[str]:
        """The columns that the templates use, in order of appearance."""
        templates = [template for _, template in self.turns] + ([self.answer] if self.answer else [])
        return list(dict.fromkeys(field for template in templates for field in fields_of(template)))

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
        used = {name for _, template in self.turns for name in fields_of(template)}
        # A null is a row's own lack, not a mistake in the call: the row stays, without a score.
        nulls = {name for name in self.fields if name in fields and fields[name] is None}
        fields = {**fields, **dict.fromkeys(nulls, "")} if nulls else fields
        filled = [(role, render(template, fields, where=where)) for role, template in self.turns]
        problem = None
        if nulls or not any(str(fields[name]).strip() for name in used):
            problem = ("empty", "the fields of the prompt are empty or null")
        text = _apply_chat_template(tokenizer, filled) if self.is_chat else filled[0][1]
        answer = render(self.answer, fields, where=where) if self.answer is not None else ""
        if any("\ud800" <= letter <= "\udfff" for letter in text + answer):
            problem = ("invalid", "the text holds half of a surrogate pair, which is no character")
        return Rendered(text=text + answer, answer_start=len(text), problem=problem)


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


def hash_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer does: its definition and its chat template, as it renders today."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    template = getattr(tokenizer, "chat_template", None)
    # Some templates insert the date: what they render is part of what is scored.
    shown = _apply_chat_template(tokenizer, [("user", "x")]) if isinstance(template, str) else ""
    return f"sha256:{hashlib.sha256((body + json.dumps(template) + shown).encode()).hexdigest()}"


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


def _apply_chat_template(tokenizer: Any, turns: list[tuple[str, str]]) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise SparsortError(
            "this model's tokenizer has no chat template (a base model?). Use a plain prompt, without chat=True (--chat)."
        )
    from jinja2 import TemplateError

    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(role for role, _ in turns)
        raise SparsortError(
            f"this model's chat template refuses the turns {roles}: {error}. Leave out the system turn, or use a plain "
            "prompt, without chat=True (--chat)."
        ) from error
