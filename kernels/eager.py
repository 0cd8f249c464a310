"""A decorator for functions that torch.compile must not compile.

A decorated function runs uncompiled inside a compiled model, at the price of a graph break. The block-sparse operations and the
attention function need it, because their work depends on the positions of sequences, and because the alignment loss keeps its
state in Python objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def in_eager(function: F) -> F:
    """Apply `torch.compiler.disable` and keep the type of the decorated function."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
