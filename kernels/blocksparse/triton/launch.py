"""How the attention kernels are launched: tile sizes, warps and pipeline stages by shape, dtype and device.

Contract: pure arithmetic in Python, no timing and no trial runs, so that a shape always runs the same kernel and a run can be
repeated bit for bit. A tile is the first of a list of preferred ones that the shared memory of a program holds. The estimate of
what it takes was set against the kernels compiled for sm_80, sm_86 and sm_90 by Triton 3.6 and 3.7, and is not below theirs;
the preferences are by counting arithmetic and traffic, not yet timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.triton.unions import MAX_QUERIES

Pass = Literal["forward", "query", "key"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2_E = 1 / math.log(2)
MAX_WIDTH = 256

# By (the pass is that of the keys, bytes of an element): rows, keys and stages. Rows of 64 fill a warp group's matrix
# instruction on sm_90, and larger tiles would pay for more of their neighbours' blocks. Of float32 at most 32 by 32 keep the
# key pass off that instruction, for which its tiles would be held twice.
_PREFERRED = {
    (False, 2): ((64, 64, 2), (64, 32, 2), (64, 32, 1), (32, 16, 1), (16, 16, 1)),
    (True, 2): ((64, 128, 2), (64, 64, 2), (32, 64, 2), (32, 32, 2), (32, 32, 1), (16, 16, 1)),
    (False, 4): ((32, 64, 2), (32, 32, 2), (32, 32, 1), (16, 32, 2), (16, 32, 1), (16, 16, 1)),
    (True, 4): ((32, 32, 2), (16, 32, 2), (16, 16, 2), (16, 16, 1)),
}
# Elements of a sum beyond which even 8 warps cannot hold it.
_MOST_SUMS = {2: 64 * 256, 4: 32 * 128}
# Sums and products in registers of each of 4 warps' threads above which ptxas spills them: then 8 warps. A float32 product is
# made of three, whose operands are in registers too.
_HELD_BY_THREAD = {2: 128, 4: 40}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel's tile of `rows` (query, head) rows by `keys` keys, its warps and its pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def launch(which: Pass, query: Tensor, layout: Layout, *, heads: int, block_size: int) -> Launch:
    """The launch of one pass.

    Args:
        which: "forward"; "query", the gradient of the queries; "key", that of keys and values.
        query: (B, H, T, D), for its dtype, width and device.
        layout: the sequences; short ones get small tiles.
        heads: R, of a group.
        block_size: W.
    """
    longest = max((span.queries for span in layout.spans), default=1)
    return choose_launch(
        which,
        width=query.shape[-1],
        element=query.element_size(),
        rows_of_longest=longest * heads,
        heads=heads,
        block_size=block_size,
        shared=shared_memory(query.device),
    )


def choose_launch(
    which: Pass, *, width: int, element: int, rows_of_longest: int, heads: int, block_size: int, shared: int
) -> Launch:
    """`launch` by numbers alone: bytes of an element, rows of the longest sequence, and bytes of shared memory of a program."""
    padded = max(16, triton.next_power_of_2(width))
    # A tile's queries are the bits of an int64, and a dot takes no fewer than 16 rows.
    most_rows = max(16, min(triton.next_power_of_2(rows_of_longest), MAX_QUERIES * triton.next_power_of_2(heads)))
    most_keys = max(16, triton.next_power_of_2(block_size))
    for rows, keys, stages in _PREFERRED[which == "key", element]:
        rows, keys = min(rows, most_rows), min(keys, most_keys)
        fits = _bytes(which, rows, keys, padded, element, stages) <= shared
        if fits and (keys if which == "key" else rows) * padded <= _MOST_SUMS[element]:
            break
    sums, products = (2 * keys * padded, 2) if which == "key" else (rows * padded, 1 if which == "forward" else 2)
    held = (sums + products * rows * keys) / (4 * 32)
    return Launch(rows=rows, keys=keys, warps=8 if held > _HELD_BY_THREAD[element] else 4, stages=stages)


def check_triton(query: Tensor) -> None:
    """Refuse what the kernels do not take.

    Raises:
        SparsortError: float64, or heads wider than 256.
    """
    if query.dtype not in _DTYPES or not 1 <= query.shape[-1] <= MAX_WIDTH:
        raise SparsortError(
            f"the Triton attention takes float16, bfloat16 or float32 heads of width up to {MAX_WIDTH}, got {query.dtype} of "
            f"width {query.shape[-1]}. Set SPARSORT_BLOCKSPARSE=torch."
        )


def matmul_precision(query: Tensor) -> str:
    """Products of float32: in three TF32 products, near float32's own precision, unless torch is told that less will do."""
    exact = query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 in the interpreter."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _bytes(which: Pass, rows: int, keys: int, padded: int, element: int, stages: int) -> int:
    kept, streamed = {"forward": (rows, 2 * keys), "query": (2 * rows, 2 * keys), "key": (2 * keys, 2 * rows)}[which]
    # Tiles that are used both as they are and transposed may be held twice: of float32, and of 16 bits without a pipeline.
    twice = 0
    if which == "query" and element == 4 and stages == 1:
        twice = keys
    elif which == "key" and (element == 4 or stages == 1):
        twice = 2 * rows if element == 4 else rows
    # What passes through shared memory between the dots, and the vectors beside the tiles.
    between = 2 * rows * keys * element + 8 * (rows + keys) * stages
    return (kept + stages * streamed + twice) * padded * element + between


def shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 99 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))
