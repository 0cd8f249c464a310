"""The dtypes that a model can run in, by name: the one list for the checks, the messages and the help, without torch."""

from __future__ import annotations

from typing import Literal, get_args

Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
DTYPES: tuple[str, ...] = get_args(Dtype)[1:]
