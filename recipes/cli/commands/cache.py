"""The command `sparsort cache`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from sparsort.recipes.cli.options import JsonOption
from sparsort.storage import cache as user_cache
from sparsort.terminal.printing import show, show_json

_WHAT = {"models": "converted models and tokenizers", "rows": "what models computed for rows"}


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all of it; the embedded model is converted again when needed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what the cache holds: converted models, and what models computed for rows; or remove it."""
    # A limit that is not a number is found before anything is removed.
    for kind in user_cache.KINDS:
        user_cache.limit_of(kind)
    removed = user_cache.clear() if clear else []
    found = user_cache.describe()
    if as_json:
        show_json(found | {"removed": {"entries": len(removed), "bytes": sum(entry.bytes for entry in removed)}})
        return
    if clear:
        show(f"Removed {len(removed)} entries, {_size(sum(entry.bytes for entry in removed))}.")
    show(found["folder"])
    for line in cache_lines(found):
        show(line)


def cache_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """One line for each part of the cache, of which `found` is the description."""
    for kind, what in _WHAT.items():
        part = found[kind]
        entries = f"{part['entries']} {'entry' if part['entries'] == 1 else 'entries'}"
        yield (
            f"{kind}: {entries}, {_size(part['bytes'])} of at most {_size(part['limit'])} "
            f"(SPARSORT_CACHE_{kind.upper()}_GB): {what}"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
