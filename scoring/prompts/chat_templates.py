"""Renders chat turns by the chat template of a model. No other module renders chat templates.

Contract: any error of a template becomes a `RefusedTurnsError`, or another `SparsortError` if the template cannot render any
turns. The length of the text and the work of the template are limited, see `metered_templates`. If a tokenizer has its own
`apply_chat_template`, that method is called, and only the length of its text is checked.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from sparsort.errors import SparsortError

Turns = Sequence[tuple[str, str]]

_PLAIN = "use a plain prompt instead of the chat template"
_NO_TEMPLATE = "Use a plain prompt instead of chat turns or conversations, or a model that was tuned for chat."

# Two contents that have no word in common, so that a template that inserts its turns renders them differently.
_PROBES = ("Count the apples.", "Where is it raining today?")
_MAX_PROBED = 64
# Tokenizer classes and templates that were probed and not refused.
_probed: set[tuple[type, str]] = set()


class RefusedTurnsError(SparsortError):
    """A chat template does not accept these turns; it may accept others."""


def need_chat_template(tokenizer: Any, *, step: str = "") -> None:
    """Refuse a tokenizer without a chat template, or with a template that ignores the contents of turns.

    Args:
        tokenizer: the tokenizer, or None.
        step: the next step at the end of the message; "" for the next step of a user who wrote a prompt.

    Raises:
        SparsortError: there is no template, or it renders different turns as the same text.
    """
    if not getattr(tokenizer, "chat_template", None):
        reason = (
            "no tokenizer was given"
            if tokenizer is None
            else f"{_model(tokenizer)} has no chat template (a base model?)"
        )
        raise SparsortError(f"chat turns need a chat template, but {reason}. {step or _NO_TEMPLATE}")
    key = (type(tokenizer), str(tokenizer.chat_template))
    if key in _probed:
        return
    if _ignores_turns(tokenizer):
        raise SparsortError(
            f"the chat template of {_model(tokenizer)} gives the same text for different turns, so all rows would have the same "
            f"score. {step or f'Correct it in the folder of the model, or {_PLAIN}.'}"
        )
    if len(_probed) >= _MAX_PROBED:
        _probed.clear()
    _probed.add(key)


def _ignores_turns(tokenizer: Any) -> bool:
    try:
        first, second = (_render(tokenizer, [("user", content)], ask=True, step="") for content in _PROBES)
    except SparsortError:
        # Some templates refuse a single question. The turns of the rows are then accepted or refused one by one.
        return False
    return first == second


def apply_chat_template(tokenizer: Any, turns: Turns, *, ask: bool = True, step: str = "") -> str:
    """Render (role, content) turns by the chat template of the model.

    The template writes the special tokens, so its text must be tokenised with `add_special_tokens=False`.

    Args:
        tokenizer: a transformers tokenizer, or an object with `chat_template` and `apply_chat_template`.
        turns: one or more turns.
        ask: end the text with the beginning of an assistant turn, so that the model answers.
        step: the next step at the end of the message; "" for the next step of a user who wrote a prompt.

    Raises:
        RefusedTurnsError: the template raises an error for these turns, or exceeds its limits.
        SparsortError: there is no template, or it cannot be compiled.
    """
    need_chat_template(tokenizer)
    return _render(tokenizer, turns, ask=ask, step=step)


def _render(tokenizer: Any, turns: Turns, *, ask: bool, step: str) -> str:
    messages = [{"role": str(role), "content": str(content)} for role, content in turns]
    render = _renderer(tokenizer, ask)
    try:
        return render(messages)
    except Exception as error:  # a template is a program of unknown origin, which can raise any error
        roles = [role for role, _ in turns]
        first_roles = ", ".join(roles[:4]) + (", …" if len(roles) > 4 else "")
        if not step:
            step = f"Remove the system turn, or {_PLAIN}." if "system" in roles else f"{_PLAIN.capitalize()}."
        raise RefusedTurnsError(
            f"the chat template of {_model(tokenizer)} refuses the turns {first_roles}: {_reason(error)}. {step}"
        ) from error


def _renderer(tokenizer: Any, ask: bool) -> Callable[[list[dict[str, str]]], str]:
    """The function that renders messages, or a `SparsortError` if the template cannot be compiled."""
    from sparsort.scoring.prompts import metered_templates as metered

    options = {"add_generation_prompt": ask}
    if not metered.can_meter(tokenizer):

        def by_tokenizer(messages: list[dict[str, str]]) -> str:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
            metered.check_output(len(text), _n_chars(messages))
            return text

        return by_tokenizer
    try:
        template = metered.compile_metered(tokenizer.get_chat_template())
    except Exception as error:  # the compiler evaluates constants of the template, which can raise any error
        raise SparsortError(
            f"the chat template of {_model(tokenizer)} cannot be read: {_reason(error)}. Correct it in the model's folder, or "
            f"{_PLAIN}."
        ) from error

    def by_template(messages: list[dict[str, str]]) -> str:
        # transformers passes the same variables to a template.
        values = {"messages": messages, "tools": None, "documents": None, **options, **tokenizer.special_tokens_map}
        return metered.render_metered(template, values, n_chars=_n_chars(messages))

    return by_template


def _n_chars(messages: list[dict[str, str]]) -> int:
    return sum(len(text) for message in messages for text in message.values())


def _model(tokenizer: Any) -> str:
    name = getattr(tokenizer, "name_or_path", "")
    return f"the model {name!r}" if name else "this model's tokenizer"


def _reason(error: Exception) -> str:
    """The error of a template in one line."""
    from jinja2 import TemplateError

    from sparsort.scoring.prompts.metered_templates import TooMuchWorkError

    # An error that the template raises itself is a sentence. Other errors, such as a KeyError, are clear only with their type.
    message = textwrap.shorten(str(error).rstrip("."), 200, placeholder=" …")
    is_sentence = isinstance(error, (TemplateError, TooMuchWorkError)) and message
    return message if is_sentence else f"{type(error).__name__}{message and f': {message}'}"
