"""What this machine computes with, and why: the answer of `sparsort env`."""

from __future__ import annotations

from typing import Any

import sparsort
from sparsort.errors import SparsortError
from sparsort.storage import cache


def describe_environment() -> dict[str, Any]:
    """Versions, the implementations chosen with their reasons, what the cache holds, and the embedded model's folder.

    The embedded model is unpacked on the first call if its package is installed (about a minute, once).
    """
    import torch

    from sparsort.kernels.backend import (
        blocksparse_implementation,
        compute_dtype,
        default_device,
        sparsity_implementation,
    )
    from sparsort.scoring.loading.demo_model import LICENCE, demo_folder
    from sparsort.scoring.scorers.base import versions

    device = default_device()
    torch_device = torch.device(device.value)
    dtype, sparsity = compute_dtype(torch_device), sparsity_implementation(torch_device)
    blocksparse = blocksparse_implementation(torch_device)
    try:
        folder, why = str(demo_folder()), f"embedded model, under the {LICENCE['name']}, {LICENCE['url']}"
    except SparsortError as error:
        folder, why = None, str(error)
    holds = cache.describe()
    return {
        "version": sparsort.__version__,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "cache": holds.pop("folder"),
        "cache_holds": holds,
        "demo_model": folder,
        "demo_model_note": why,
        "choices": {
            "device": {"value": str(device.value), "reason": device.reason},
            "dtype": {"value": str(dtype.value).removeprefix("torch."), "reason": dtype.reason},
            "sparsity": {"value": str(sparsity.value), "reason": sparsity.reason},
            "blocksparse": {"value": str(blocksparse.value), "reason": blocksparse.reason},
        },
    }
