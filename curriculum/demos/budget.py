"""The number of tokens of a prompt, and the demonstrations that fit under a limit.

Contract: tokens are counted on a whole text, exactly as a model reads it. `fit` makes few counts, and the number that it returns
was counted, not estimated.

Shapes: K demonstrations.
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
    """The tokenizer of the model with this name or folder; an argument that is not text is returned unchanged."""
    if not isinstance(tokenizer, str):
        return tokenizer
    # Imported here, because it imports torch.
    from sparsort.scoring.loading.demo_model import load_tokenizer

    return load_tokenizer(tokenizer)


def counter(tokenizer: Any, *, add_special_tokens: bool) -> Count:
    """A function that counts the tokens of a text.

    Args:
        tokenizer: an object with `encode` (transformers, tokenizers), or a function from a text to its number of tokens.
        add_special_tokens: whether to count the special tokens that the tokenizer adds; False if the text contains them.

    Raises:
        SparsortError: the tokenizer is neither of the two, or, at a later call, the function returns no number.
    """
    # A tokenizer of transformers is callable too, so `encode` is looked up first.
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
                f"the tokenizer function returned a {type(number).__name__}; it must return the number of tokens of a text."
            ) from error

    return count


def chat_text(tokenizer: Any, messages: Messages) -> str:
    """The text that the model's chat template makes of chat turns, up to the beginning of the assistant's next turn.

    The template has inserted the special tokens already, so this text is tokenised with `add_special_tokens=False`.

    Raises:
        SparsortError: there is no chat template, or it refuses these turns; some templates have no system turn.
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
        step="If it has no system turn, put the instruction into prompt (--prompt) instead of system (--system). Otherwise "
        "build plain text, without chat=True (--chat).",
    )


def fit(first_to_go: Sequence[int], max_tokens: int, tokens_with: TokensWith) -> tuple[list[int] | None, int]:
    """The largest number of demonstrations that fit, found by bisection with about log2(K) + 2 counts.

    Args:
        first_to_go: positions of the K demonstrations, in the order in which they are dropped.
        max_tokens: the limit.
        tokens_with: function from ascending positions to the tokens of a prompt with only these demonstrations.

    Returns:
        The positions that are kept, ascending, and the tokens of the prompt; or None and the tokens of the query alone, if even
        those exceed the limit.
    """

    def kept(n_dropped: int) -> list[int]:
        return sorted(first_to_go[n_dropped:])

    all_tokens = tokens_with(kept(0))
    if all_tokens <= max_tokens:
        return kept(0), all_tokens
    # Bisection over the number of dropped demonstrations: `too_few` leaves a prompt over the limit, `enough` one that fits.
    too_few, enough = 0, len(first_to_go)
    tokens = tokens_with([])
    if tokens > max_tokens:
        return None, tokens
    # `tokens` always belongs to `enough`, so the result needs no further count.
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        count = tokens_with(kept(middle))
        if count <= max_tokens:
            enough, tokens = middle, count
        else:
            too_few = middle
    return kept(enough), tokens
