"""Optional dependencies: imported where they are used, with the install line when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from sparsort.errors import SparsortError


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or say which extra of sparsort brings it.

    Args:
        module: the import name.
        extra: the extra of this package that installs it.
        purpose: what the caller wanted it for, completing "… is needed for".

    Raises:
        SparsortError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise SparsortError(
            f"{module} is needed for {purpose}. Install it with: pip install 'sparsort[{extra}]'."
        ) from error
