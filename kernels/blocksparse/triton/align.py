"""The alignment loss between attention and index scores, with its gradients, in Triton.

Contract: the interface is that of `cpu.align.align_forward`, the computation is in float32 whatever the tensors' dtype, and the
oracle is `reference.align_ref`. With P as the mean of the group's heads' probabilities over the selection (MSA,
arXiv 2606.13392), KL(P ‖ student) = Σ P (log P − log student), and the gradient of a score is student − P.

Keys are the outer loop. A program holds keys of one block and gathers the queries that chose it, from the reverse of the
selection. The products therefore fill their tiles, whatever the size of the group and however different the choices of adjacent
queries. Sums over the blocks of a query are written per slot and added afterwards in the order of slots, and a block's sum over
its queries is computed by one program. There are no atomics, so results are bitwise reproducible. Queries are processed in
chunks, which limits the intermediate results to about 256 MiB. If there are too few blocks to keep the GPU busy, the queries of
a chunk are split among programs.

Legend: B batch, T query columns, S key columns, H query heads, G groups, R = H/G, D head width, I index width, K slots,
W block size, C queries of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection, reverse
from sparsort.kernels.blocksparse.triton.align_kernels import align_kernel, lse_kernel
from sparsort.kernels.blocksparse.triton.launch import LOG2_E, check_triton, matmul_precision, processors, shared_memory
from sparsort.kernels.blocksparse.triton.segments import key_blocks

# The maximum size in bytes of the results that a chunk writes per slot.
_CHUNK_BYTES = 256 << 20
_MOST_SPLITS = 8


class Work(NamedTuple):
    """The queries of every block, divided by sub-ranges of query columns. A chunk has `splits` sub-ranges.

    Attributes:
        query, slot: those of `Reverse`.
        table: the result of `key_blocks`.
        bounds: (B · G · N, sub-ranges + 1) int64, the first entry in `query` of each block and sub-range.
        range: the number of query columns in a sub-range.
        splits: the number of sub-ranges in a chunk.
        blocks: N, the number of blocks in the row that has the most.
    """

    query: Tensor
    slot: Tensor
    table: Tensor
    bounds: Tensor
    range: int
    splits: int
    blocks: int

    def order(self, chunk: int) -> Tensor:
        """Return the chunk's (block, split) pairs by descending number of queries, so that the longest do not start last."""
        bounds = self.bounds[:, chunk * self.splits : (chunk + 1) * self.splits + 1]
        return bounds.diff().flatten().argsort(descending=True)


class Tiles(NamedTuple):
    """The numbers of queries and keys in a tile, and of warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


def align_forward_triton(
    query: Tensor,
    key: Tensor,
    index_query: Tensor,
    index_key: Tensor,
    selection: Selection,
    layout: Layout,
    *,
    scale: float,
    index_scale: float,
    lse: Tensor | None = None,
    gradients: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute KL(P ‖ student) of every token and group.

    Args:
        query: (B, H, T, D), float16, bfloat16 or float32; any strides, here and below. D and I are at most 256.
        key: (B, G, S, D).
        index_query: (B, G, T, I).
        index_key: (B, S, I).
        selection, layout: the support of both distributions.
        scale, index_scale: factors for the attention logits and for the index scores.
        lse: (B, H, T), the log-sum-exp from `attend_forward_triton` without a bias; None: it is computed here.
        gradients: whether to compute the gradients of rows.sum().

    Returns:
        Rows (B, G, T) float32, 0 for padding and for tokens that see nothing, and the gradients, or None: that of index_query
        in its dtype, that of index_key in float32, in which sums over many tokens stay in range.

    Raises:
        SparsortError: the kernels do not support a dtype or a width.
    """
    check_triton(query)
    check_triton(index_query)
    B, H, T, _ = query.shape
    G, S, width = index_query.shape[1], *index_key.shape[1:]
    K, W = selection.blocks.shape[3], selection.block_size
    rows = torch.zeros((B, G, T), dtype=torch.float32, device=query.device)
    d_query = torch.zeros_like(index_query) if gradients else None
    if not layout.tokens or not K or not H:
        return rows, d_query, torch.zeros_like(index_key, dtype=torch.float32) if gradients else None
    plan = _tiles(query, index_query, W, shared_memory(query.device))
    slots = K * triton.cdiv(W, plan.keys)
    work = _work(selection, layout, slots * (width if gradients else H // G + 2))
    d_key = torch.zeros((work.splits, B, G, S, width) if gradients else (1,), dtype=torch.float32, device=query.device)
    if lse is not None:
        lse = lse.float()
    for chunk, start in enumerate(range(0, T, work.range * work.splits)):
        C = min(work.range * work.splits, T - start)
        part = slice(start, start + C)
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            run = _Run(work, plan, selection, layout, chunk, start, C, slots)
            student = run.lse(index_query, index_key[:, None].expand(B, G, S, width), index_scale)
            head = run.lse(query, key, scale) if lse is None else lse[:, :, part]
            kl, d_slot = run.align(
                query, key, index_query, index_key, head, student, d_key, scale, index_scale, gradients
            )
        rows[:, :, part] = kl.sum(-1)
        if d_query is not None:
            d_query[:, :, part] = d_slot.sum(-2).to(d_query.dtype)
    return rows, d_query, d_key.sum(dim=(0, 2)) if gradients else None


class _Run(NamedTuple):
    """The launches of one chunk, which has C query columns from `start` on."""

    work: Work
    plan: Tiles
    selection: Selection
    layout: Layout
    chunk: int
    start: int
    C: int
    slots: int

    def lse(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Return the log-sum-exp (B, H, C) float32 over the selection of query (B, H, T, D) with key (B, G, S, D)."""
        B, H, _, D = query.shape
        R = H // key.shape[1]
        by_slot = torch.full((B, H, self.C, self.slots), -torch.inf, device=query.device)
        lse_kernel[self._grid()](
            *(query, key, by_slot),
            *self._places(query),
            *query.stride(),
            *key.stride(),
            scale * LOG2_E,
            *self._sizes(R),
            WIDTH=D,
            PADDED=max(16, triton.next_power_of_2(D)),
            **self._tile(query),
        )
        return by_slot.logsumexp(-1)

    def align(
        self,
        query: Tensor,
        key: Tensor,
        index_query: Tensor,
        index_key: Tensor,
        lse: Tensor,
        student: Tensor,
        d_key: Tensor,
        scale: float,
        index_scale: float,
        gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return each slot's part of KL (B, G, C, slots) and of the query gradient (B, G, C, slots, I); add to `d_key`."""
        B, G, _, width = index_query.shape
        D = query.shape[3]
        kl = torch.zeros((B, G, self.C, self.slots), device=query.device)
        d_slot = torch.zeros((*kl.shape, width) if gradients else (1,), device=query.device)
        align_kernel[self._grid()](
            *(query, key, index_query, index_key, lse, student, kl, d_slot, d_key),
            *self._places(query),
            *query.stride(),
            *key.stride(),
            *index_query.stride(),
            *index_key.stride(),
            *lse.stride(),
            scale * LOG2_E,
            index_scale * LOG2_E,
            index_scale,
            self.layout.keys,
            *self._sizes(query.shape[1] // G),
            WIDTH=D,
            PADDED=max(16, triton.next_power_of_2(D)),
            INDEX_WIDTH=width,
            INDEX_PADDED=max(16, triton.next_power_of_2(width)),
            GRADIENTS=gradients,
            **self._tile(query),
        )
        return kl, d_slot

    def _grid(self) -> tuple[int, int]:
        return len(self.work.bounds) * self.work.splits, triton.cdiv(self.selection.block_size, self.plan.keys)

    def _places(self, query: Tensor) -> tuple[Tensor, ...]:
        work = self.work
        position = self.layout.position(query.device)
        return work.order(self.chunk), work.bounds, work.table, work.query, work.slot, position

    def _sizes(self, heads: int) -> tuple[int, ...]:
        """Return the kernels' arguments from `bounds_t` to HEADS, in order."""
        work, (batch, groups) = self.work, self.selection.blocks.shape[:2]
        first = self.chunk * work.splits
        return work.bounds.shape[1], first, work.splits, batch, groups, work.blocks, self.layout.queries, *(
            self.start, self.C, self.slots, heads,
        )  # fmt: skip

    def _tile(self, query: Tensor) -> dict[str, object]:
        return {
            "BLOCK_SIZE": self.selection.block_size,
            "ROWS": self.plan.rows,
            "KEYS": self.plan.keys,
            "PRECISION": matmul_precision(query),
            "num_warps": self.plan.warps,
            "num_stages": self.plan.stages,
        }


def _work(selection: Selection, layout: Layout, floats: int) -> Work:
    """Reverse a selection and divide it into chunks, each query of which writes `floats` float32, up to `_CHUNK_BYTES`."""
    batch, groups, queries, slots = selection.blocks.shape
    device = selection.blocks.device
    chosen = reverse(selection, layout)
    splits = max(1, min(_MOST_SPLITS, 4 * processors(device) // (batch * groups * slots)))
    columns = max(1, min(queries, _CHUNK_BYTES // (4 * batch * groups * floats)))
    columns = triton.cdiv(columns, splits)
    edges = torch.arange(0, triton.cdiv(queries, columns * splits) * splits + 1, device=device) * columns
    blocks = torch.arange(len(chosen.start) - 1, device=device)
    of_block = blocks.repeat_interleave(chosen.start.diff(), output_size=len(chosen.query))
    places = blocks[:, None] * queries + edges.clamp(max=queries)
    bounds = torch.searchsorted(of_block * queries + chosen.query, places)
    table = key_blocks(layout, chosen.first_block, chosen.blocks, selection.block_size, device)
    return Work(chosen.query, chosen.slot, table, bounds, columns, splits, chosen.blocks)


def _tiles(query: Tensor, index_query: Tensor, block_size: int, shared: int) -> Tiles:
    """Return the largest tile whose operands fit a program's shared memory, as measured on the compiled kernels."""
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
    return Tiles(rows, keys, 8 if wide else 4, stages)
