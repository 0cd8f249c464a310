"""Index scores, block max-pool and top-k in one Triton kernel, which writes only the chosen blocks.

Contract: `index_select_triton` gives the same result as `reference.index_select_ref`, computed in float32 whatever the tensors'
dtype. A score that is not finite counts as lowest, ties go to the lower block, and the local block is always taken. Neither the
(T, S) scores nor the (T, N) block scores are written to memory. There are no atomics, so results are bitwise reproducible.

A program holds rows of one sequence, where a row is a (token, group) pair. All groups share the index keys, so a tile of adjacent
tokens with all of their groups reads each key once. The program goes through the key blocks up to its last token's own block. It
keeps the K best blocks of each row in registers, as 64-bit numbers that order as (score, lower block) do, and a new block
replaces the worst one if it is better. If there are too few rows to fill the GPU (decoding), the keys are split among programs
and their candidates are merged.

Legend: B batch, G groups, T query columns, S key columns, I index width, W block size, N blocks, K slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import Budget, FixedBudget, wanted_slots
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection
from sparsort.kernels.blocksparse.triton.select_kernel import select_kernel

MAX_WIDTH = 256
MAX_SLOTS = 128


class Chosen(NamedTuple):
    """The K highest blocks of every token, and the softmax statistics that budgets by shares need.

    Attributes:
        blocks: (B, G, T, K) int32, the local block first, then by descending score; −1 in unused slots and in padding.
        scores: (B, G, T, K) float32, the scores of these blocks; −∞ in unused slots.
        highest: (B, G, T) float32, the maximum score of all visible blocks.
        total: (B, G, T) float32, the sum of exp(score − highest) over all visible blocks, so that their log-sum-exp is
            highest + log total.
    """

    blocks: Tensor
    scores: Tensor
    highest: Tensor
    total: Tensor


def index_select_triton(
    index_query: Tensor, index_key: Tensor, layout: Layout, budget: Budget, *, block_size: int, scale: float
) -> Selection:
    """Select blocks by index scores (MSA, arXiv 2606.13392), without a gradient.

    Args:
        index_query: (B, G, T, I) of float16, bfloat16 or float32, any strides; I at most 256.
        index_key: (B, S, I), of the same dtype.
        layout: the sequences.
        budget: number of blocks per query token, at most 128.
        block_size: W.
        scale: factor for the scores.

    Returns:
        Selection with K = min(budget's slots, blocks of the longest sequence).

    Raises:
        SparsortError: the kernel does not support the width, the number of slots or the dtype.
    """
    if isinstance(budget, FixedBudget):
        blocks = _highest(index_query, index_key, layout, budget.slots, block_size, scale, scored=False)
        return Selection(blocks=blocks.blocks, block_size=block_size)
    chosen = _highest(index_query, index_key, layout, budget.slots, block_size, scale, scored=True)
    share = (chosen.scores - chosen.highest[..., None]).exp() / chosen.total[..., None]
    return Selection(blocks=torch.where(wanted_slots(share, budget), chosen.blocks, -1), block_size=block_size)


def _highest(
    index_query: Tensor,
    index_key: Tensor,
    layout: Layout,
    slots: int,
    block_size: int,
    scale: float,
    *,
    scored: bool,
    splits: int | None = None,
) -> Chosen:
    """Return the `slots` highest blocks of every token.

    Args:
        scored: whether to fill `Chosen` with scores and softmax statistics too.
        splits: the number of programs that share the keys of a tile; None: chosen to fill the GPU.
    """
    B, G, T, width = index_query.shape
    K = min(slots, layout.blocks(block_size))
    if index_query.dtype not in (torch.float16, torch.bfloat16, torch.float32) or width > MAX_WIDTH or K > MAX_SLOTS:
        raise SparsortError(
            f"the Triton kernel takes float16, bfloat16 or float32 of width up to {MAX_WIDTH} and up to {MAX_SLOTS} slots, got "
            f"{index_query.dtype} of width {width} and {K}. Set SPARSORT_BLOCKSPARSE=torch for the torch path."
        )
    index_query, index_key = index_query.detach(), index_key.detach()
    if scale < 0:
        # The kernel scales after the maximum, which is only valid for a scale that is not negative.
        index_query, scale = -index_query, -scale
    longest = max((span.queries for span in layout.spans), default=0)
    rows, keys, i_tile, stages = _tiles(longest * G, width, block_size, K, index_query.dtype)
    w_tile = min(triton.next_power_of_2(block_size), keys)
    tiles = triton.cdiv(longest * G, rows)
    programs = len(layout.spans) * tiles
    if splits is None:
        splits = _splits(programs, triton.cdiv(layout.blocks(block_size), keys // w_tile), index_query.device)
    scored = scored or splits > 1
    blocks = torch.full((splits, B, G, T, K), -1, dtype=torch.int32, device=index_query.device)
    scores = torch.full(blocks.shape if scored else (0,), -torch.inf, device=index_query.device)
    softmax = torch.ones((splits, B, G, T, 2) if scored else (0,), device=index_query.device)
    if programs and K:
        with torch.cuda.device_of(index_query):  # type: ignore[no-untyped-call]
            select_kernel[(programs * splits,)](
                index_query,
                index_key,
                layout.table(index_query.device),
                blocks,
                scores,
                softmax,
                len(layout.spans),
                tiles,
                splits,
                *index_query.stride(),
                *index_key.stride(),
                *blocks.stride()[:4],
                B * G * T,
                G * T,
                T,
                float(scale),
                G=G,
                WIDTH=width,
                WIDTH_TILE=i_tile,
                W=block_size,
                W_TILE=w_tile,
                BLOCKS=keys // w_tile,
                ROWS=rows,
                K=K,
                K_PAD=triton.next_power_of_2(K),
                SCORED=scored,
                num_warps=4,
                num_stages=stages,
            )
    if not scored:
        return Chosen(blocks[0], scores, softmax, softmax)
    if splits > 1:
        return _merge(blocks, scores, softmax, layout, block_size)
    return Chosen(blocks[0], scores[0], softmax[0, ..., 0], softmax[0, ..., 1])


def _merge(blocks: Tensor, scores: Tensor, softmax: Tensor, layout: Layout, block_size: int) -> Chosen:
    """Merge the candidates of all splits into the K highest, in the order of `Chosen`."""
    K = blocks.shape[-1]
    blocks, scores = (part.movedim(0, -2).flatten(-2) for part in (blocks, scores))
    # Sort by block and then, with a stable sort, by score, so that ties go to the lower block. Unused slots have a score of −∞
    # and come last.
    blocks, order = blocks.sort(dim=-1, stable=True)
    scores = scores.gather(-1, order)
    own = torch.div(layout.position(blocks.device), block_size, rounding_mode="floor")[:, None, :, None]
    ranked = scores.masked_fill((blocks == own) & (blocks >= 0), torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :K]
    highest = softmax[..., 0].amax(dim=0)
    total = (softmax[..., 1] * (softmax[..., 0] - highest).exp()).sum(dim=0)
    return Chosen(blocks.gather(-1, order), scores.gather(-1, order), highest, total)


def _tiles(rows: int, width: int, block_size: int, slots: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Return the rows and keys of a tile, the index width of one product, and the pipeline stages of the loads.

    A tile of 128 rows has four warps, so each thread holds the K best blocks of one row. With 64 keys at a time, there are enough
    registers for that and for two programs per multiprocessor.
    """
    i_tile = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:
        # Full float32 products do not run on the tensor cores, and their operands take up registers.
        most, keys, i_tile = 32, 32, min(i_tile, 32)
    else:
        most, keys = (128 if i_tile <= 128 and slots <= 64 else 64), 64
    parts = triton.cdiv(block_size, keys)
    in_flight = parts * keys * i_tile * dtype.itemsize
    return min(most, max(16, triton.next_power_of_2(rows))), keys, i_tile, 2 if in_flight <= 32768 else 1


def _splits(programs: int, steps: int, device: torch.device) -> int:
    """Return the number of parts of the keys that gives work to every multiprocessor, with at least four steps per part."""
    if device.type != "cuda" or programs == 0:
        return 1
    # `Any` because torch's stubs lack the attribute.
    properties: Any = torch.cuda.get_device_properties(device)
    return max(1, min(2 * int(properties.multi_processor_count) // programs, steps // 4))
