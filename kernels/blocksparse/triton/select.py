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

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsort.errors import SparsortError
from sparsort.kernels.blocksparse.budgets import Budget, FixedBudget, wanted_slots
from sparsort.kernels.blocksparse.layout import Layout
from sparsort.kernels.blocksparse.selection import Selection

MAX_WIDTH = 256
MAX_SLOTS = 128

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_INT32_MAX = tl.constexpr(0x7FFFFFFF)
_INT64_MIN = tl.constexpr(-(2**63))
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
        with torch.cuda.device_of(index_query):
            select_kernel[(programs * splits,)](
                *(index_query, index_key, layout.table(index_query.device), blocks, scores, softmax),
                *(len(layout.spans), tiles, splits),
                *(*index_query.stride(), *index_key.stride(), *blocks.stride()[:4]),
                # The strides of `softmax`, which is empty if it is not written.
                *(B * G * T, G * T, T),
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


@triton.jit
def _rank_key(score, block, own):
    """Return an int64 that orders as (score, lower block) does: the local block first, and invisible blocks last."""
    # Replace −0 by +0, which it is equal to.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    # Flipping the low 31 bits of negative floats makes their bits order as integers do.
    ordered = bits ^ ((bits >> 31) & _INT32_MAX)
    ordered = tl.where(block == own, _INT32_MAX, ordered)
    key = (ordered.to(tl.int64) << 32) | (-block + _INT32_MAX).to(tl.int64)
    return tl.where(block <= own, key, _INT64_MIN)


@triton.jit
def load_rows(row_ptrs, rows, width, stride_i, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Load vectors that start at `row_ptrs` [n, 1], 0 past WIDTH and, if `MASKED`, where `rows` [n] is False."""
    mask = (width < WIDTH)[None, :]
    if MASKED:
        mask = mask & rows[:, None]
    vectors = tl.load(row_ptrs + width[None, :] * stride_i, mask=mask, other=0.0)
    if _INTERPRETED:
        vectors = vectors.to(tl.float32)
    return vectors


@triton.jit
def _dot(query, key):
    return tl.dot(query, tl.trans(key), input_precision="ieee")


@triton.jit
def _step(
    step, query, query_ptrs, live, position, own, best_keys, highest, total, own_score,
    key_ptr,
    query_i, key_s, key_i,
    keys, scale,
    WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, W: tl.constexpr, W_TILE: tl.constexpr, BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, MASKED: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """Score the BLOCKS blocks from step · BLOCKS on for every row, and update the K best blocks.

    Args:
        query: [ROWS, WIDTH_TILE], the complete vectors if WIDTH is at most WIDTH_TILE; otherwise, vectors are read tile by tile
            from `query_ptrs` [ROWS, 1] if `live`.
        position, own: [ROWS], the position of each row's token, and its local block.
        best_keys: [K_PAD, ROWS] int64, the rank keys of the best blocks so far. Those of a row are in one thread, so finding the
            worst needs no exchange between threads.
        highest, total, own_score: [ROWS], the maximum score, the sum of exp(score − maximum), and the local block's score.
        MASKED: whether a key of the step may be invisible or past the end of a block.
    """
    slot = tl.arange(0, BLOCKS * W_TILE)
    width = tl.arange(0, WIDTH_TILE)
    for part in tl.static_range((W + W_TILE - 1) // W_TILE):
        within = part * W_TILE + slot % W_TILE
        place = (step * BLOCKS + slot // W_TILE) * W + within
        key_ptrs = key_ptr + place[:, None].to(tl.int64) * key_s
        there = (within < W) & (place < keys)
        if WIDTH <= WIDTH_TILE:
            score = _dot(query, load_rows(key_ptrs, there, width, key_i, WIDTH, MASKED))
        else:
            score = tl.zeros((ROWS, BLOCKS * W_TILE), tl.float32)
            for i in range(0, WIDTH, WIDTH_TILE):
                part_of_query = load_rows(query_ptrs, live, i + width, query_i, WIDTH, True)
                score += _dot(part_of_query, load_rows(key_ptrs, there, i + width, key_i, WIDTH, MASKED))
        # score + 0 · score turns infinities into NaN, which a maximum ignores. Neither then hides the block's other keys.
        score = tl.fma(score, tl.zeros_like(score), score)
        if MASKED:
            score = tl.where(there[None, :] & (place[None, :] <= position[:, None]), score, float("-inf"))
        best = tl.max(tl.reshape(score, (ROWS, BLOCKS, W_TILE)), 2)
        if part == 0:  # noqa: SIM108, Triton folds the statement, not the expression
            pooled = best
        else:
            pooled = tl.maximum(pooled, best)
    pooled = pooled * scale
    pooled = tl.where(tl.abs(pooled) < float("inf"), pooled, _LOWEST)
    for j in tl.static_range(BLOCKS):
        block = step * BLOCKS + j
        if BLOCKS == 1:
            score = tl.reshape(pooled, (ROWS,))
        else:
            score = tl.sum(tl.where(tl.arange(0, BLOCKS)[None, :] == j, pooled, 0.0), 1)
        if SCORED:
            seen = block <= own
            above = tl.where(seen, tl.maximum(highest, score), highest)
            total = total * tl.exp(highest - above) + tl.where(seen, tl.exp(score - above), 0.0)
            highest = above
            own_score = tl.where(block == own, score, own_score)
        candidate = _rank_key(score, block, own)
        worst = tl.min(best_keys, 0)
        place_of_worst = (best_keys == worst[None, :]) & (candidate > worst)[None, :]
        best_keys = tl.where(place_of_worst, candidate[None, :], best_keys)
    return best_keys, highest, total, own_score


@triton.jit(do_not_specialize=["sequences", "tiles", "splits"])
def select_kernel(
    query_ptr, key_ptr, table_ptr, blocks_ptr, scores_ptr, softmax_ptr,
    sequences, tiles, splits,
    query_b, query_g, query_t, query_i, key_b, key_s, key_i, blocks_split, blocks_b, blocks_g, blocks_t,
    softmax_split, softmax_b, softmax_g,
    scale,
    G: tl.constexpr, WIDTH: tl.constexpr, WIDTH_TILE: tl.constexpr, W: tl.constexpr, W_TILE: tl.constexpr,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # The last tiles see the most keys, so they start first.
    tile = tiles - 1 - program // (sequences * splits)
    split = program // sequences % splits
    entry = table_ptr + program % sequences * 5
    batch = tl.load(entry).to(tl.int64)
    query_start = tl.load(entry + 1)
    queries = tl.load(entry + 2)
    key_start = tl.load(entry + 3).to(tl.int64)
    keys = tl.load(entry + 4)
    if tile * ROWS >= queries * G:
        return

    row = tile * ROWS + tl.arange(0, ROWS)
    live = row < queries * G
    group = row % G
    token = tl.where(live, row // G, queries - 1)
    column = (query_start + token).to(tl.int64)
    position = keys - queries + token
    own = position // W
    query_ptrs = query_ptr + batch * query_b + (group.to(tl.int64) * query_g + column * query_t)[:, None]
    query = load_rows(query_ptrs, live, tl.arange(0, WIDTH_TILE), query_i, WIDTH, True)
    key_ptr += batch * key_b + key_start * key_s

    # The initial rank keys are below those of all visible blocks, and distinct, so that a new block replaces exactly one.
    best_keys = tl.full((K_PAD, ROWS), _INT64_MIN, tl.int64) + (tl.arange(0, K_PAD) + 1).to(tl.int64)[:, None]
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    if SCORED:
        # A finite initial maximum avoids −∞ − (−∞).
        highest = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    own_score = tl.full((ROWS,), float("-inf"), tl.float32)

    steps = (keys - queries + tl.minimum((tile * ROWS + ROWS - 1) // G, queries - 1)) // W // BLOCKS + 1
    share = (steps + splits - 1) // splits
    first = split * share
    last = tl.minimum(first + share, steps)
    # Before step `full`, the tile's first token, and hence every token, sees all keys, so no mask is needed.
    full = first
    if W % W_TILE == 0:
        full = tl.maximum(tl.minimum((keys - queries + tile * ROWS // G + 1) // (W * BLOCKS), last), first)
        for step in range(first, full):
            best_keys, highest, total, own_score = _step(
                step, query, query_ptrs, live, position, own, best_keys, highest, total, own_score,
                key_ptr, query_i, key_s, key_i, keys, scale,
                WIDTH, WIDTH_TILE, W, W_TILE, BLOCKS, ROWS, False, SCORED,
            )  # fmt: skip
    for step in range(full, last):
        best_keys, highest, total, own_score = _step(
            step, query, query_ptrs, live, position, own, best_keys, highest, total, own_score,
            key_ptr, query_i, key_s, key_i, keys, scale,
            WIDTH, WIDTH_TILE, W, W_TILE, BLOCKS, ROWS, True, SCORED,
        )  # fmt: skip

    place = split * blocks_split + batch * blocks_b + group.to(tl.int64) * blocks_g + column * blocks_t
    for slot in range(K):
        top = tl.max(best_keys, 0)
        best_keys = tl.where(best_keys == top[None, :], _INT64_MIN, best_keys)
        # Initial rank keys, up to _INT64_MIN + K_PAD, mark unused slots.
        is_block = top > tl.full((), _INT64_MIN, tl.int64) + K_PAD
        block = -(top & 0xFFFFFFFF).to(tl.int32) + _INT32_MAX
        tl.store(blocks_ptr + place + slot, tl.where(is_block, block, -1), mask=live)
        if SCORED:
            ordered = (top >> 32).to(tl.int32)
            score = (ordered ^ ((ordered >> 31) & _INT32_MAX)).to(tl.float32, bitcast=True)
            score = tl.where(block == own, own_score, score)
            tl.store(scores_ptr + place + slot, tl.where(is_block, score, float("-inf")), mask=live)
    if SCORED:
        place = 2 * (split * softmax_split + batch * softmax_b + group.to(tl.int64) * softmax_g + column)
        tl.store(softmax_ptr + place, highest, mask=live)
        tl.store(softmax_ptr + place + 1, total, mask=live)
