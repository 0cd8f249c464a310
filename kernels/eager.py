"""A decorator for what torch.compile must not compile.

A decorated function runs uncompiled inside a compiled model, at the price of a break in its graph. The block-sparse operations
and the attention function need it: their work depends on where sequences are, and the alignment loss keeps account in Python
objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def in_eager(function: F) -> F:
    """`torch.compiler.disable`, with the type of what it decorates."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
