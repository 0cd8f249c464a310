"""A prompt from ordered demonstrations and a query, as text or chat turns, under a token budget.

Contract: demonstrations keep the order given; a budget only takes some away, by a stated policy, and the report says
which. Tokens are counted on the whole text as the model gets it, special tokens included, never as a sum of parts. A
query that is among its own demonstrations is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sparsort.conditions import Table, excludes, needs, refuse_unread_arguments
from sparsort.curriculum.demos.blocks import Blocks, conversation_blocks, template_blocks
from sparsort.curriculum.demos.budget import DEFAULT_MODEL, Messages, TokensWith, chat_text, counter, fit, load
from sparsort.curriculum.demos.pool.duplicates import duplicates
from sparsort.curriculum.demos.pool.leaks import Leak
from sparsort.curriculum.demos.pool.rows import Row, id_of, listed, name_of
from sparsort.errors import SparsortError, unknown_choice
from sparsort.scoring.prompts.prompt import Prompt

Drop = Literal["farthest", "nearest", "longest", "error"]

# A separator has an effect in plain text only.
NOT_IN_CHAT = excludes("chat", "{chat} makes a turn of every block")
# What a setting needs to be read; see `sparsort.conditions`.
READ_BY: Table = {
    "separator": (NOT_IN_CHAT, excludes("messages", "{messages} makes turns of every conversation")),
    "drop": (needs("max_tokens", "nothing is dropped without {max_tokens}", max_tokens=1000),),
    "allow_zero_shot": (needs("max_tokens", "nothing is dropped without {max_tokens}", max_tokens=1000),),
}
_WHICH = {
    "farthest": "farthest from the query in the order",
    "nearest": "nearest to the query in the order",
    "longest": "longest",
}


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A prompt.

    Attributes:
        text: what the model reads. From a chat template it begins with the special tokens already.
        add_special_tokens: how to tokenise `text`: False for text from a chat template, else a second BOS is added.
        messages: the chat turns, or None for plain text.
        kept: positions in `demos` of the demonstrations in the prompt, in its order.
        dropped: positions of those that the budget took away.
        n_tokens: tokens of `text` with its special tokens, or None without a tokenizer.
        report: one sentence about what is in the prompt and what was dropped.
        notes: duplicates among the demonstrations in it, one sentence each; they are kept.
    """

    text: str
    add_special_tokens: bool
    messages: Messages | None
    kept: list[int]
    dropped: list[int]
    n_tokens: int | None
    report: str
    notes: list[str] = field(default_factory=list)


def build_prompt(
    demos: Sequence[Row],
    query: Row | str,
    *,
    prompt: str | None = None,
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
    """The text of a few-shot prompt; `assemble` takes the same arguments, documents them, and returns what was dropped.

    What a budget drops, and demonstrations that are in the prompt twice, are logged as warnings (logger "sparsort"), which Python
    prints on stderr by default.
    """
    made = assemble(
        demos,
        query,
        prompt=prompt,
        answer=answer,
        messages=messages,
        system=system,
        separator=separator,
        chat=chat,
        max_tokens=max_tokens,
        tokenizer=tokenizer,
        drop=drop,
        allow_leaks=allow_leaks,
        allow_zero_shot=allow_zero_shot,
    )
    for note in [*([made.report] if made.dropped else []), *made.notes]:
        logging.getLogger("sparsort").warning("%s", note)
    return made.text


def assemble(
    demos: Sequence[Row],
    query: Row | str,
    *,
    prompt: str | None = None,
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
        demos: the demonstrations, first to last; the last stands next to the query.
        query: the row to be answered, or its bare text where the prompt has one field.
        prompt: format string of a row's question, such as "Question: {question}\\nAnswer:".
        answer: format string of its answer, such as " {answer}"; it follows the prompt directly.
        messages: instead of both, the column that holds whole conversations (see `prompts.conversations`): each is shown
            as chat turns up to its last assistant turn. A query is bare text, which is a user's turn, or a row of the same
            column. The conversations' system turns must agree.
        system: an instruction, as it stands: the first block of the text, or the system turn.
        separator: what stands between blocks of text; not used in chat.
        chat: make user and assistant turns (answers stripped of the spaces around them) and put them through the
            tokenizer's chat template.
        max_tokens: the most tokens that the prompt may have; None for no limit.
        tokenizer: a transformers tokenizer, the name or folder of a model, or a function from a text to its number of
            tokens. With `max_tokens` and without a tokenizer, the embedded model's.
        drop: what goes first when the budget is too small: the demonstrations "farthest" from the query in the order
            (the first ones), the "nearest", the "longest" (by characters), or "error".
        allow_leaks: let the query, or its near-duplicate, be among the demonstrations.
        allow_zero_shot: let the budget drop every demonstration.

    Raises:
        SparsortError: a field is missing; the query is among its demonstrations; the budget does not hold the query, or not one
            demonstration next to it;
            chat without a tokenizer that has a chat template; an unknown policy; a separator in chat, or a policy without a
            budget, neither of which is read.
    """
    if drop not in get_args(Drop):
        raise unknown_choice("policy for what to drop", drop, get_args(Drop))
    read = {"separator": separator, "drop": drop, "chat": chat, "messages": messages, "max_tokens": max_tokens}
    read["allow_zero_shot"] = allow_zero_shot
    refuse_unread_arguments(assemble, READ_BY, read)
    if max_tokens is not None and max_tokens < 1:
        raise SparsortError(f"max_tokens is {max_tokens}; a budget of at least 1 token is needed.")
    chat = chat or messages is not None
    blocks = _blocks(demos, query, prompt, answer, messages, system, find_leaks=not allow_leaks)
    if blocks.leaks:
        raise _leaking(demos, blocks.leaks)
    reader = load(DEFAULT_MODEL if tokenizer is None and max_tokens is not None else tokenizer)

    def prompt_with(kept: Sequence[int]) -> tuple[str, Messages | None]:
        if chat:
            turns: Messages = [{"role": "system", "content": blocks.system}] if blocks.system else []
            turns += [turn for position in kept for turn in blocks.turns[position]]
            turns += blocks.asked_turns
            return chat_text(reader, turns), turns
        head = [blocks.system] if blocks.system else []
        return separator.join([*head, *(blocks.texts[position] for position in kept), blocks.asked]), None

    kept, n_tokens = list(range(len(demos))), None
    if reader is not None:
        count = counter(reader, add_special_tokens=not chat)
        if max_tokens is None:
            n_tokens = count(prompt_with(kept)[0])
        else:
            sizes = [len(text) for text in blocks.texts]
            tokens_with: TokensWith = lambda chosen: count(prompt_with(chosen)[0])  # noqa: E731
            kept, n_tokens = _fit(sizes, max_tokens, drop, tokens_with, allow_zero_shot=allow_zero_shot)
    text, shown = prompt_with(kept)
    dropped = [position for position in range(len(demos)) if position not in kept]
    return Assembled(
        text=text,
        add_special_tokens=not chat,
        messages=shown,
        kept=kept,
        dropped=dropped,
        n_tokens=n_tokens,
        notes=duplicates([demos[at] for at in kept], [blocks.texts[at] for at in kept]),
        report=_report([id_of(demo, at) for at, demo in enumerate(demos)], dropped, n_tokens, max_tokens, drop),
    )


def _blocks(
    demos: Sequence[Row],
    query: Row | str,
    prompt: str | None,
    answer: str | None,
    messages: str | None,
    system: str | None,
    *,
    find_leaks: bool,
) -> Blocks:
    if messages is not None:
        # Refuses what does not go with a conversation.
        Prompt.given(prompt, messages=messages, answer=answer, system=system)
        return conversation_blocks(demos, query, messages, find_leaks=find_leaks)
    if prompt is None or answer is None:
        raise SparsortError(
            "a prompt needs prompt= and answer=, format strings such as 'Question: {question}\\nAnswer:' and ' {answer}', or "
            "messages=, the column of whole conversations."
        )
    return template_blocks(demos, query, prompt, answer, system, find_leaks=find_leaks)


def _leaking(demos: Sequence[Row], leaks: Sequence[Leak]) -> SparsortError:
    who = [
        name_of(demos[leak.demo], leak.demo)
        + (" (the same text)" if leak.kind == "exact" else f" (similarity {leak.similarity:.2f})")
        for leak in leaks
    ]
    return SparsortError(
        f"the query is among its own demonstrations, so its answer is given away: {listed(who)}. "
        "Leave it out of the demonstrations, or pass allow_leaks=True."
    )


def _fit(
    sizes: list[int], max_tokens: int, drop: Drop, tokens_with: TokensWith, *, allow_zero_shot: bool
) -> tuple[list[int], int]:
    positions = list(range(len(sizes)))
    if drop == "nearest":
        first_to_go = positions[::-1]
    elif drop == "longest":
        first_to_go = sorted(positions, key=lambda position: -sizes[position])
    else:
        first_to_go = positions
    if drop == "error":
        needed = tokens_with(positions)
        if needed > max_tokens:
            raise SparsortError(
                f"the prompt with its {len(sizes)} demonstrations has {needed} tokens, but max_tokens is {max_tokens}. "
                "Raise it, pass fewer demonstrations, or let some be dropped with drop='farthest'."
            )
        return positions, needed
    kept, n_tokens = fit(first_to_go, max_tokens, tokens_with)
    if kept is None:
        raise SparsortError(
            f"the query alone needs {n_tokens} tokens without any demonstration, but max_tokens is {max_tokens}. "
            f"Raise max_tokens to at least {n_tokens}, or shorten the query or the template."
        )
    if sizes and not kept and not allow_zero_shot:
        # The last to go is the first that would fit.
        needed = tokens_with(first_to_go[-1:])
        raise SparsortError(
            f"max_tokens is {max_tokens}, which holds the query ({n_tokens} tokens) but not one of its {len(sizes)} "
            f"demonstrations: with the one that is dropped last it is {needed} tokens. Raise max_tokens to at least {needed}, or "
            "pass allow_zero_shot=True (--allow-zero-shot) for a prompt without demonstrations."
        )
    return kept, n_tokens


def _report(ids: list[str], dropped: list[int], n_tokens: int | None, max_tokens: int | None, drop: Drop) -> str:
    kept = len(ids) - len(dropped)
    tokens = "tokens not counted" if n_tokens is None else f"{n_tokens} tokens"
    if max_tokens is not None:
        tokens += f" of at most {max_tokens}"
    if not ids:
        return f"No demonstrations ({tokens})."
    if not dropped:
        return f"Kept all demonstrations, {kept} ({tokens})."
    who = listed([repr(ids[position]) for position in dropped], most=10)
    return f"Kept {kept} of {len(ids)} demonstrations ({tokens}); dropped the {len(dropped)} {_WHICH[drop]}: {who}."
