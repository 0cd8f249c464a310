"""The launch parameters of the attention kernels: tile sizes, warps and pipeline stages by shape, dtype and device.

Contract: the parameters are computed by plain arithmetic, without timing and trial runs. A shape therefore always runs the same
kernel, and results are reproducible bit for bit. The tile is the first one in a list of preferred tiles that fits into a
program's shared memory. The estimate of the shared memory was compared with kernels compiled for sm_80, sm_86 and sm_90 by
Triton 3.6 and 3.7, and is never lower than theirs. The preferences come from counts of arithmetic and memory traffic and have
not been timed.
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

KernelPass = Literal["forward", "query", "key"]

INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2_E = 1 / math.log(2)
MAX_WIDTH = 256

# (is the key pass, bytes per element) → preferred (rows, keys, stages). 64 rows fill the matrix instruction of a warp group on
# sm_90, and with more rows a tile would process more blocks that only other rows chose. With float32, tiles of at most 32 by 32
# keep the key pass from using that instruction, which would need two copies of its tiles.
_PREFERRED = {
    (False, 2): ((64, 64, 2), (64, 32, 2), (64, 32, 1), (32, 16, 1), (16, 16, 1)),
    (True, 2): ((64, 128, 2), (64, 64, 2), (32, 64, 2), (32, 32, 2), (32, 32, 1), (16, 16, 1)),
    (False, 4): ((32, 64, 2), (32, 32, 2), (32, 32, 1), (16, 32, 2), (16, 32, 1), (16, 16, 1)),
    (True, 4): ((32, 32, 2), (16, 32, 2), (16, 16, 2), (16, 16, 1)),
}
# The largest number of elements in a sum that the registers of 8 warps can hold, by bytes per element.
_MOST_SUMS = {2: 64 * 256, 4: 32 * 128}
# The largest number of sums and products per thread for which 4 warps suffice; above it, ptxas spills registers. A float32
# product is computed as three TF32 products, whose operands are in registers too.
_MOST_PER_THREAD = {2: 128, 4: 40}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The launch parameters of a kernel: a tile of `rows` (query, head) rows by `keys` keys, warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def launch(which: KernelPass, query: Tensor, layout: Layout, *, heads: int, block_size: int) -> Launch:
    """Return the launch parameters of one pass.

    Args:
        which: "forward"; "query" for the gradient of the queries; "key" for the gradients of keys and values.
        query: (B, H, T, D), from which dtype, width and device are read.
        layout: the sequences; short ones get small tiles.
        heads: R, the number of heads in a group.
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
    which: KernelPass, *, width: int, element: int, rows_of_longest: int, heads: int, block_size: int, shared: int
) -> Launch:
    """Return the result of `launch` from plain numbers; `element` and `shared` (the memory of a program) are in bytes."""
    padded = max(16, triton.next_power_of_2(width))
    # The queries of a tile are bits of an int64, and tl.dot needs at least 16 rows.
    most_rows = max(16, min(triton.next_power_of_2(rows_of_longest), MAX_QUERIES * triton.next_power_of_2(heads)))
    most_keys = max(16, triton.next_power_of_2(block_size))
    for rows, keys, stages in _PREFERRED[which == "key", element]:
        rows, keys = min(rows, most_rows), min(keys, most_keys)
        fits = _bytes(which, rows, keys, padded, element, stages) <= shared
        if fits and (keys if which == "key" else rows) * padded <= _MOST_SUMS[element]:
            break
    sums, products = (2 * keys * padded, 2) if which == "key" else (rows * padded, 1 if which == "forward" else 2)
    per_thread = (sums + products * rows * keys) / (4 * 32)
    return Launch(rows=rows, keys=keys, warps=8 if per_thread > _MOST_PER_THREAD[element] else 4, stages=stages)


def align_launch(query: Tensor, index_query: Tensor, block_size: int, shared: int) -> Launch:
    """Return the launch parameters of the alignment kernels.

    The tile is the largest one whose operands fit a program's shared memory, as measured on the compiled kernels.
    """
    width, index_width = (max(16, triton.next_power_of_2(t.shape[-1])) for t in (query, index_query))
    element = query.element_size()
    rows, keys, stages = (64, 128, 2) if element == 2 else (32, 32, 2)
    keys = max(16, min(keys, triton.next_power_of_2(block_size)))

    def needed() -> int:
        elements = keys * (width + index_width) + rows * (index_width + stages * width + keys)
        # A float32 product is computed as three TF32 products, each of which needs its own operands.
        return int(elements * (2 if element == 2 else 7))

    while needed() > shared or keys * index_width > 128 * 128:
        if keys > 32:
            keys //= 2
        elif stages > 1:
            stages = 1
        elif rows > 16:
            rows //= 2
        else:
            break
    # Above this size, ptxas spills the registers of four warps.
    wide = rows * keys >= 64 * 64 or keys * max(width, index_width) >= 32 * 128
    return Launch(rows=rows, keys=keys, warps=8 if wide else 4, stages=stages)


def check_triton(query: Tensor) -> None:
    """Check that the kernels support the dtype and the width of `query`.

    Raises:
        SparsortError: the dtype is float64, or the heads are wider than 256.
    """
    if query.dtype not in _DTYPES or not 1 <= query.shape[-1] <= MAX_WIDTH:
        raise SparsortError(
            f"the Triton attention takes float16, bfloat16 or float32 heads of width up to {MAX_WIDTH}, got {query.dtype} of "
            f"width {query.shape[-1]}. Set SPARSORT_BLOCKSPARSE=torch."
        )


def matmul_precision(query: Tensor) -> str:
    """Return the `input_precision` of products for the dtype of `query`.

    Float32 products are computed as three TF32 products, which is close to float32 precision, unless
    `torch.set_float32_matmul_precision` allows less.
    """
    exact = query.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 in the interpreter."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _bytes(which: KernelPass, rows: int, keys: int, padded: int, element: int, stages: int) -> int:
    """Estimate the shared memory of a program in bytes."""
    resident, streamed = {"forward": (rows, 2 * keys), "query": (2 * rows, 2 * keys), "key": (2 * keys, 2 * rows)}[
        which
    ]
    # A tile that is used both as it is and transposed may need two copies: with float32, and with 16 bits without a pipeline.
    twice = 0
    if which == "query" and element == 4 and stages == 1:
        twice = keys
    elif which == "key" and (element == 4 or stages == 1):
        twice = 2 * rows if element == 4 else rows
    # Intermediate results pass through shared memory between two products, and there are vectors per row and per key.
    between = 2 * rows * keys * element + 8 * (rows + keys) * stages
    return (resident + stages * streamed + twice) * padded * element + between


def shared_memory(device: torch.device) -> int:
    """Return the shared memory that a program can use, in bytes; in the interpreter, that of a small GPU."""
    if device.type != "cuda":
        return 99 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 * 1024))
