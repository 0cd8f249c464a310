"""Tokens of a prompt: how to count them, and which demonstrations fit under a limit.

Contract: a count is of a whole text as a model reads it. `fit` asks for few counts, and what it returns was counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sparsort.errors import SparsortError

Count = Callable[[str], int]
TokensWith = Callable[[list[int]], int]
Messages = list[dict[str, str]]

DEFAULT_MODEL = "demo"


def load(tokenizer: Any) -> Any:
    """The tokenizer that a name or folder stands for; anything else is returned as it is."""
    if not isinstance(tokenizer, str):
        return tokenizer
    from sparsort.scoring.loading.demo_model import load_tokenizer

    return load_tokenizer(tokenizer)


def counter(tokenizer: Any, *, add_special_tokens: bool) -> Count:
    """A function that counts the tokens of a text.

    Args:
        tokenizer: an object with `encode` (transformers, tokenizers), or a function from a text to a number.
        add_special_tokens: count the special tokens that the tokenizer adds; False where the text holds them already.

    Raises:
        SparsortError: neither of the two, or later, the function does not give a number.
    """
    if hasattr(tokenizer, "encode"):
        return lambda text: len(tokenizer.encode(text, add_special_tokens=add_special_tokens))
    if not callable(tokenizer):
        raise SparsortError(
            f"the tokenizer is a {type(tokenizer).__name__}; a transformers tokenizer, the name or folder of a model, "
            "or a function from a text to its number of tokens is needed."
        )

    def count(text: str) -> int:
        number = tokenizer(text)
        try:
            return int(number)
        except (OverflowError, TypeError, ValueError) as error:
            raise SparsortError(
                f"the tokenizer function gave a {type(number).__name__} for a text; it must give the number of tokens."
            ) from error

    return count


def chat_text(tokenizer: Any, messages: Messages) -> str:
    """Chat turns as the text that the model's chat template makes of them, where the assistant's next turn begins.

    The template has put the special tokens in, so this text is tokenised with `add_special_tokens=False`.

    Raises:
        SparsortError: no chat template, or it refuses these turns (some know no system turn).
    """
    from sparsort.scoring.prompts.chat_templates import apply_chat_template, need_chat_template

    need_chat_template(
        tokenizer,
        step="Pass the tokenizer, name or folder of an instruction-tuned model as tokenizer=, or use templates without chat to "
        "build plain text.",
    )
    turns = [(message["role"], message["content"]) for message in messages]
    return apply_chat_template(
        tokenizer,
        turns,
        step="If it knows no system turn, put the instruction into prompt (--prompt) instead of system (--system). Otherwise "
        "build plain text, without chat=True (--chat).",
    )


def fit(first_to_go: Sequence[int], max_tokens: int, tokens_with: TokensWith) -> tuple[list[int] | None, int]:
    """The most demonstrations that fit, found by halving: about log2(K) + 2 counts.

    Args:
        first_to_go: positions of the K demonstrations, the first to be dropped first.
        max_tokens: the limit.
        tokens_with: tokens of the prompt with only the given positions in it, ascending.

    Returns:
        The positions kept, ascending, and the prompt's tokens; or None and the tokens of the query alone, which do not
        fit.
    """

    def kept(n_dropped: int) -> list[int]:
        return sorted(first_to_go[n_dropped:])

    everything = tokens_with(kept(0))
    if everything <= max_tokens:
        return kept(0), everything
    too_few, enough = 0, len(first_to_go)
    tokens = tokens_with([])
    if tokens > max_tokens:
        return None, tokens
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        count = tokens_with(kept(middle))
        if count <= max_tokens:
            enough, tokens = middle, count
        else:
            too_few = middle
    return kept(enough), tokens
