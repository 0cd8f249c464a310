"""Writing TOML, which the standard library only reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def dump(table: Mapping[str, Any]) -> str:
    """A table of plain values as TOML: one key per line, tables within lists inline, and no key whose value is None."""
    return "".join(f"{_key(key)} = {_inline(value)}\n" for key, value in table.items() if value is not None)


def _key(key: str) -> str:
    return (
        key if key and all(letter.isascii() and (letter.isalnum() or letter in "_-") for letter in key) else _text(key)
    )


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_inline(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return _text(value) if isinstance(value, str) else repr(value)


def _text(value: str) -> str:
    # A JSON string is a TOML one but for the delete character, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
