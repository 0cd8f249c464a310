"""A prompt from ordered demonstrations and a query, as text or chat turns, under a token budget.

Contract: demonstrations keep their order. A budget only drops some of them, by a stated policy, and the report names those.
Tokens are counted on the whole text as the model reads it, with its special tokens, and never as a sum of parts. A query that is
among its own demonstrations is refused.

Shapes: K demonstrations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sparsort.conditions import Table, excludes, needs, refuse_unread_arguments
from sparsort.curriculum.demos.blocks import Blocks, conversation_blocks, function_blocks, template_blocks
from sparsort.curriculum.demos.budget import DEFAULT_MODEL, Messages, TokensWith, chat_text, counter, fit, load
from sparsort.curriculum.demos.pool.duplicates import duplicates
from sparsort.curriculum.demos.pool.leaks import Leak
from sparsort.curriculum.demos.pool.rows import Row, id_of, listed, name_of
from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.data.rows import rows_of
from sparsort.scoring.prompts.functions import function_of
from sparsort.scoring.prompts.prompt import Prompt
from sparsort.scoring.prompts.types import PromptWriter

Drop = Literal["farthest", "nearest", "longest", "error"]

# A separator has an effect only in plain text.
NOT_IN_CHAT = excludes("chat", "{chat} makes a turn of every block")
# The conditions under which a setting is read; see `sparsort.conditions`.
READ_BY: Table = {
    "separator": (NOT_IN_CHAT, excludes("messages", "{messages} makes turns of every conversation")),
    "drop": (needs("max_tokens", "nothing is dropped without {max_tokens}", max_tokens=1000),),
    "allow_zero_shot": (needs("max_tokens", "nothing is dropped without {max_tokens}", max_tokens=1000),),
}
# Policy → the dropped demonstrations in the report.
_DROPPED = {
    "farthest": "farthest from the query in the order",
    "nearest": "nearest to the query in the order",
    "longest": "longest",
}


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A prompt.

    Attributes:
        text: the text that the model reads. The text from a chat template contains the special tokens already.
        add_special_tokens: the argument with which to tokenise `text`. It is False for the text from a chat template, which
            would otherwise get a second BOS token.
        messages: the chat turns, or None for plain text.
        kept: positions in `demos` of the demonstrations in the prompt, in their order.
        dropped: positions of the demonstrations that exceeded the budget.
        n_tokens: number of tokens of `text` with its special tokens, or None without a tokenizer.
        report: one sentence about the demonstrations that were kept and dropped.
        notes: duplicates among the demonstrations in the prompt, one sentence each; they are kept.
    """

    text: str
    add_special_tokens: bool
    messages: Messages | None
    kept: list[int]
    dropped: list[int]
    n_tokens: int | None
    report: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """The form of a prompt: arguments of `assemble`, under the same names."""

    prompt: str | PromptWriter | None = None
    answer: str | None = None
    messages: str | None = None
    system: str | None = None
    separator: str = "\n\n"
    chat: bool = False
    max_tokens: int | None = None
    drop: Drop = "farthest"
    allow_zero_shot: bool = False


def build_prompt(
    demos: Any,
    query: Row | str,
    *,
    prompt: str | PromptWriter | None = None,
    answer: str | None = None,
    messages: str | None = None,
    system: str | None = None,
    separator: str = "\n\n",
    chat: bool = False,
    max_tokens: int | None = None,
    tokenizer: Any = None,
    drop: Drop = "farthest",
    allow_leaks: bool = False,
    allow_zero_shot: bool = False,
) -> str:
    """Build the text of a few-shot prompt. The arguments are those of `assemble`, which also reports what was dropped.

    Demonstrations that the budget drops and duplicates are logged as warnings (logger "sparsort"), which Python prints on stderr
    by default.
    """
    # At this point the locals are exactly the arguments, which `assemble` takes under the same names.
    assembled = assemble(**locals())
    for note in [*([assembled.report] if assembled.dropped else []), *assembled.notes]:
        logging.getLogger("sparsort").warning("%s", note)
    return assembled.text


def assemble(
    demos: Any,
    query: Row | str,
    *,
    prompt: str | PromptWriter | None = None,
    answer: str | None = None,
    messages: str | None = None,
    system: str | None = None,
    separator: str = "\n\n",
    chat: bool = False,
    max_tokens: int | None = None,
    tokenizer: Any = None,
    drop: Drop = "farthest",
    allow_leaks: bool = False,
    allow_zero_shot: bool = False,
) -> Assembled:
    """Build a few-shot prompt.

    Args:
        demos: the K demonstrations, first to last, in any form that `open_rows` reads; the last one is next to the query.
        query: the row to be answered, or its bare text if the prompt has one field.
        prompt: format string of a row's question, such as "Question: {question}\\nAnswer:"; or a function from a row to its
            question as text or as chat turns, which imply `chat`.
        answer: format string of its answer, such as " {answer}"; it follows the prompt directly.
        messages: instead of both, the column of whole conversations, whose system turns must agree. Each is shown as chat turns,
            up to its last assistant turn. The query is bare text, which becomes a user's turn, or a row with the column.
        system: an instruction, copied unchanged: the first block of the text, or the system turn.
        separator: the text between two blocks of plain text.
        chat: make chat turns, with the spaces around answers removed, and apply the tokenizer's chat template.
        max_tokens: the maximum number of tokens of the prompt; None for no limit.
        tokenizer: a transformers tokenizer, the name or folder of a model, or a function from a text to its number of tokens.
            By default, with `max_tokens`, that of the embedded model.
        drop: the demonstrations to drop first if the budget is too small: the "farthest" from the query (the first ones),
            the "nearest", or the "longest" in characters. "error" refuses such a budget.
        allow_leaks: allow the query, or a near-duplicate of it, among the demonstrations.
        allow_zero_shot: allow the budget to drop all demonstrations.

    Raises:
        SparsortError: a missing field; a query among its demonstrations; a budget that is too small; chat without a chat
            template; an unknown policy; or a setting that has no effect.
    """
    if drop not in get_args(Drop):
        raise unknown_choice("policy for what to drop", drop, get_args(Drop))
    form = PromptForm(
        prompt=prompt,
        answer=answer,
        messages=messages,
        system=system,
        separator=separator,
        chat=chat,
        max_tokens=max_tokens,
        drop=drop,
        allow_zero_shot=allow_zero_shot,
    )
    refuse_unread_arguments(assemble, READ_BY, vars(form))
    return _assemble(rows_of(demos), query, form, tokenizer, allow_leaks=allow_leaks)


def _assemble(
    demos: Sequence[Row], query: Row | str, form: PromptForm, tokenizer: Any, *, allow_leaks: bool
) -> Assembled:
    max_tokens = form.max_tokens
    if max_tokens is not None and max_tokens < 1:
        raise SparsortError(f"max_tokens is {max_tokens}; a budget of at least 1 token is needed.")
    blocks = _blocks(demos, query, form, find_leaks=not allow_leaks)
    chat = form.chat or form.messages is not None or blocks.are_turns
    if blocks.leaks:
        raise _leaking(demos, blocks.leaks)
    # Without a budget, tokens are counted only if the caller passes a tokenizer.
    reader = load(DEFAULT_MODEL if tokenizer is None and max_tokens is not None else tokenizer)

    def prompt_with(kept: Sequence[int]) -> tuple[str, Messages | None]:
        if chat:
            turns: Messages = [{"role": "system", "content": blocks.system}] if blocks.system else []
            turns += [turn for position in kept for turn in blocks.turns[position]]
            turns += blocks.query_turns
            return chat_text(reader, turns), turns
        head = [blocks.system] if blocks.system else []
        return form.separator.join([*head, *(blocks.texts[position] for position in kept), blocks.query]), None

    kept, n_tokens = list(range(len(demos))), None
    if reader is not None:
        count = counter(reader, add_special_tokens=not chat)
        if max_tokens is None:
            n_tokens = count(prompt_with(kept)[0])
        else:
            # Not a sum over blocks: tokens can merge across their boundaries, and a template may add some per turn.
            kept, n_tokens = _fit(blocks.texts, form, max_tokens, lambda chosen: count(prompt_with(chosen)[0]))
    text, turns = prompt_with(kept)
    dropped = [position for position in range(len(demos)) if position not in kept]
    return Assembled(
        text=text,
        add_special_tokens=not chat,
        messages=turns,
        kept=kept,
        dropped=dropped,
        n_tokens=n_tokens,
        # Two rows with different fields are duplicates here if the prompt shows the same text for both.
        notes=duplicates([demos[at] for at in kept], [blocks.texts[at] for at in kept]),
        report=_report([id_of(demo, at) for at, demo in enumerate(demos)], dropped, n_tokens, form),
    )


def _blocks(demos: Sequence[Row], query: Row | str, form: PromptForm, *, find_leaks: bool) -> Blocks:
    if form.messages is not None:
        # `Prompt.given` refuses arguments that cannot be combined with a conversation.
        Prompt.given(form.prompt, messages=form.messages, answer=form.answer, system=form.system)
        return conversation_blocks(demos, query, form.messages, find_leaks=find_leaks)
    if form.prompt is None or form.answer is None:
        raise SparsortError(
            "a prompt needs prompt= and answer=, format strings such as 'Question: {question}\\nAnswer:' and ' {answer}', or "
            "messages=, the column of whole conversations."
        )
    if (function := function_of(form.prompt)) is not None:
        return function_blocks(demos, query, function, form.answer, form.system, find_leaks=find_leaks)
    prompt: Any = form.prompt
    return template_blocks(demos, query, prompt, form.answer, form.system, find_leaks=find_leaks)


def _leaking(demos: Sequence[Row], leaks: Sequence[Leak]) -> SparsortError:
    leaking = [
        name_of(demos[leak.demo], leak.demo)
        + (" (the same text)" if leak.kind == "exact" else f" (similarity {leak.similarity:.2f})")
        for leak in leaks
    ]
    return SparsortError(
        f"the query is among its own demonstrations, so its answer is given away: {listed(leaking)}. "
        "Remove it from the demonstrations, or pass allow_leaks=True."
    )


def _fit(texts: list[str], form: PromptForm, max_tokens: int, tokens_with: TokensWith) -> tuple[list[int], int]:
    """The demonstrations that fit under the limit by the policy of the form, and the tokens of the prompt with them."""
    positions = list(range(len(texts)))
    match form.drop:
        case "nearest":
            first_to_go = positions[::-1]
        case "longest":
            # The sort is stable: among demonstrations of equal length, the farthest is dropped first.
            first_to_go = sorted(positions, key=lambda position: -len(texts[position]))
        case "farthest":
            first_to_go = positions
        case "error":
            needed = tokens_with(positions)
            if needed > max_tokens:
                raise SparsortError(
                    f"the prompt with its {len(texts)} demonstrations has {needed} tokens, but max_tokens is {max_tokens}. "
                    "Raise it, pass fewer demonstrations, or allow some to be dropped with drop='farthest'."
                )
            return positions, needed
    kept, n_tokens = fit(first_to_go, max_tokens, tokens_with)
    if kept is None:
        raise SparsortError(
            f"the query alone needs {n_tokens} tokens without any demonstration, but max_tokens is {max_tokens}. "
            f"Raise max_tokens to at least {n_tokens}, or shorten the query or the template."
        )
    if texts and not kept and not form.allow_zero_shot:
        # The demonstration that is dropped last is the first one that a larger budget would hold.
        needed = tokens_with(first_to_go[-1:])
        raise SparsortError(
            f"max_tokens is {max_tokens}, which holds the query ({n_tokens} tokens) but not one of its {len(texts)} "
            f"demonstrations: with the one that is dropped last, the prompt has {needed} tokens. Raise max_tokens to at least "
            f"{needed}, or pass allow_zero_shot=True (--allow-zero-shot) for a prompt without demonstrations."
        )
    return kept, n_tokens


def _report(ids: list[str], dropped: list[int], n_tokens: int | None, form: PromptForm) -> str:
    kept = len(ids) - len(dropped)
    tokens = "tokens not counted" if n_tokens is None else f"{n_tokens} tokens"
    if form.max_tokens is not None:
        tokens += f" of at most {form.max_tokens}"
    if not ids:
        return f"No demonstrations ({tokens})."
    if not dropped:
        return f"Kept all demonstrations, {kept} ({tokens})."
    names = listed([repr(ids[position]) for position in dropped], most=10)
    return f"Kept {kept} of {len(ids)} demonstrations ({tokens}); dropped the {len(dropped)} {_DROPPED[form.drop]}: {names}."
