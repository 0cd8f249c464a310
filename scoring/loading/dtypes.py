"""The names of the dtypes that a model can run in, for checks, messages and help texts, without importing torch."""

from __future__ import annotations

from typing import Literal, get_args

Dtype = Literal["auto", "bfloat16", "float16", "float32", "float64"]
DTYPES: tuple[str, ...] = get_args(Dtype)[1:]
