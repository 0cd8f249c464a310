"""What torch.compile leaves alone.

Contract: a function decorated here runs as it stands inside a compiled model, at the price of a break in its graph. The
attention function needs it: its work depends on where sequences lie, and the alignment loss keeps account in Python objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def in_eager(function: F) -> F:
    """`torch.compiler.disable`, with the type of what it decorates."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]
