"""The types of a prompt's settings, for the modules that describe prompts and those that read them, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Truncation = Literal["error", "left", "right"]
Turns = Sequence[Mapping[str, str]]
