"""The one error that sparsort raises on purpose.

Contract: a message says what was given, what was expected, and the next step; the command line prints it without a
traceback and exits with `exit_code`. Any other exception that escapes is a bug in sparsort.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class SparsortError(Exception):
    """A mistake that the caller can fix. `exit_code` is the exit status of the command line (2: bad input)."""

    exit_code = 2


def unknown_choice(
    kind: str, given: object, choices: Iterable[str], *, aliases: Mapping[str, str] | None = None
) -> SparsortError:
    """The error for a name outside a closed set. It suggests a valid name: the one that the name is an alias of, or the nearest.

    Args:
        kind: what the name stands for, as the user knows it ("metric", "site", "order").
        given: the name that was passed.
        choices: the valid names.
        aliases: other name → choice, such as names from the literature; the other names are in lower case with underscores.
    """
    names = list(choices)
    # Papers write such names with spaces, hyphens or capitals; the keys of `aliases` have one spelling.
    meant = (aliases or {}).get(str(given).strip().lower().replace("-", "_").replace(" ", "_"))
    if meant in names:
        return SparsortError(
            f"unknown {kind} {given!r}. It is called {meant!r} here. Choose one of: {', '.join(names)}."
        )
    hint = did_you_mean(given, names, cutoff=0.4)
    return SparsortError(f"unknown {kind} {given!r}.{hint} Choose one of: {', '.join(names)}.")


def did_you_mean(given: object, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """A space and a sentence that suggests the nearest valid name; empty if no name is near.

    Args:
        given: the name that was passed.
        names: the valid names; upper and lower case count as equal.
        cutoff: how near a name must be, from 0 to 1 (`difflib.get_close_matches`).
    """
    # Reversed, so that of two names that differ only in case the first one is suggested.
    by_lower = {name.lower(): name for name in reversed(list(names))}
    near = difflib.get_close_matches(str(given).lower(), list(by_lower), n=1, cutoff=cutoff)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class: quotes another library's reason in a message of sparsort."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
