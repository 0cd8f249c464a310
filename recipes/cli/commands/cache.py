"""The command `sparsort cache`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from sparsort.recipes.cli.options import JsonOption
from sparsort.storage import cache as user_cache
from sparsort.terminal.printing import show, show_json

EXAMPLE = "Example: `sparsort cache --clear`"
_CONTENTS = {"models": "converted models and tokenizers", "rows": "what models computed for rows"}


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all of it; the embedded model is converted again when needed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show or remove the contents of the cache: converted models, and what models computed for rows."""
    # A limit that is not a number is reported before anything is removed.
    for kind in user_cache.KINDS:
        user_cache.limit_of(kind)
    removed = user_cache.clear() if clear else []
    description = user_cache.describe()
    if as_json:
        show_json(description | {"removed": {"entries": len(removed), "bytes": sum(entry.bytes for entry in removed)}})
        return
    if clear:
        show(f"Removed {len(removed)} entries, {_size(sum(entry.bytes for entry in removed))}.")
    show(description["folder"])
    for line in cache_lines(description):
        show(line)


def cache_lines(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that describe each part of the cache, each at most 48 characters wide."""
    for kind, contents in _CONTENTS.items():
        part = description[kind]
        entries = f"{part['entries']} {'entry' if part['entries'] == 1 else 'entries'}"
        yield f"{kind}: {entries}, {_size(part['bytes'])} of at most {_size(part['limit'])}"
        yield f"  {contents}"
        yield f"  limited by SPARSORT_CACHE_{kind.upper()}_GB"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
