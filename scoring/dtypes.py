"""The dtypes that a model can run in, by name: the one list for the checks, the messages and the help, without torch."""

from __future__ import annotations

DTYPES = ("bfloat16", "float16", "float32", "float64")
