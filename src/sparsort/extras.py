"""Optional dependencies: imported where they are used; if one is missing, the error gives the command that installs it."""

from __future__ import annotations

import importlib
from types import ModuleType

from sparsort.errors import SparsortError


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """Import `module`, or raise an error that names the extra of sparsort that installs it.

    Args:
        module: the import name.
        extra: the extra of this package that installs it.
        purpose: completes the sentence "… is needed for".

    Raises:
        SparsortError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # The module is installed, but one of its own imports is missing: that is not ours to explain.
        if error.name != module.partition(".")[0]:
            raise
        raise SparsortError(
            f"{module} is needed for {purpose}. Install it with: pip install 'sparsort[{extra}]'."
        ) from error
