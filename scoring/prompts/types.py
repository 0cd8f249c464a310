"""Types of the settings of a prompt. They are in a file of their own so that importing them imports nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Truncation = Literal["error", "left", "right"]
Turns = Sequence[Mapping[str, str]]
