"""The one error that sparsort raises on purpose.

Contract: a message says what was given, what was expected, and the next step; the command line prints it without a
traceback and exits with `exit_code`. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class SparsortError(Exception):
    """A mistake that the caller can mend. `exit_code` is what the command line returns for it (2: bad input)."""

    exit_code = 2


def unknown_choice(
    kind: str, given: object, choices: Iterable[str], *, aliases: Mapping[str, str] | None = None
) -> SparsortError:
    """The error for a name outside a closed set, with a valid name suggested: the one that it is an alias of, or the nearest.

    Args:
        kind: what the name stands for, as the user knows it ("metric", "site", "order").
        given: what was passed.
        choices: the valid names.
        aliases: other names of some choices, such as those of the literature, in lower case with underscores.
    """
    names = list(choices)
    meant = (aliases or {}).get(str(given).strip().lower().replace("-", "_").replace(" ", "_"))
    if meant in names:
        return SparsortError(
            f"unknown {kind} {given!r}. It is called {meant!r} here. Choose one of: {', '.join(names)}."
        )
    near = difflib.get_close_matches(str(given).lower(), [name.lower() for name in names], n=1, cutoff=0.4)
    hint = next((f" Did you mean {name!r}?" for name in names if near and name.lower() == near[0]), "")
    return SparsortError(f"unknown {kind} {given!r}.{hint} Choose one of: {', '.join(names)}.")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class: another library's reason, for a message of ours."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
