"""Types of the settings of a prompt. They are in a file of their own so that importing them imports nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Truncation = Literal["error", "left", "right"]
Turns = Sequence[Mapping[str, str]]
# A function from a row to its text or chat turns; see `sparsort.scoring.prompts.functions`.
PromptWriter = Callable[[dict[str, Any]], str | Turns | None]
