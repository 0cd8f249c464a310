"""The kernel of `select.py`: index scores, block max-pool and top-k of a tile of rows, a row being a (token, group).

Legend: G groups, W block size, K slots.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
from __future__ import annotations

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_INT32_MAX = tl.constexpr(0x7FFFFFFF)
_INT64_MIN = tl.constexpr(-(2**63))
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _rank_key(score, block, own):
    """An int64 that orders as (score, lower block) does, the local block above all and what is not visible below all."""
    # −0 ties with +0.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & _INT32_MAX)
    ordered = tl.where(block == own, _INT32_MAX, ordered)
    key = (ordered.to(tl.int64) << 32) | (-block + _INT32_MAX).to(tl.int64)
    return tl.where(block <= own, key, _INT64_MIN)


@triton.jit
def load_rows(row_ptrs, rows, width, stride_i, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Vectors that start at `row_ptrs` [n, 1], 0 past WIDTH and, if `MASKED`, outside of `rows` [n]."""
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
    step,
    query,
    query_ptrs,
    live,
    position,
    own,
    kept,
    highest,
    total,
    own_score,
    key_ptr,
    query_i,
    key_s,
    key_i,
    keys,
    scale,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    W: tl.constexpr,
    W_TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    SCORED: tl.constexpr,
):
    """Blocks step · BLOCKS onwards against every row: their scores, and the K best of those seen so far.

    Args:
        query: [ROWS, WIDTH_TILE], all of the width if that is at most WIDTH_TILE; else `query_ptrs` [ROWS, 1] are read tile by
            tile, where `live`.
        position, own: [ROWS], of each row's token: where it stands, and the block it stands in.
        kept: [K_PAD, ROWS] int64, the best so far: a row's lie in one thread, so that finding the worst needs no exchange.
        highest, total, own_score: [ROWS], maximum and sum of exp(score − maximum), and the local block's score.
        MASKED: whether any key of the step may be out of sight, or past a block's end.
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
        # An infinity becomes NaN, and a maximum passes over NaN: neither hides the block's other keys.
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
        worst = tl.min(kept, 0)
        place_of_worst = (kept == worst[None, :]) & (candidate > worst)[None, :]
        kept = tl.where(place_of_worst, candidate[None, :], kept)
    return kept, highest, total, own_score


@triton.jit(do_not_specialize=["sequences", "tiles", "splits"])
def select_kernel(
    query_ptr,
    key_ptr,
    table_ptr,
    blocks_ptr,
    scores_ptr,
    softmax_ptr,
    sequences,
    tiles,
    splits,
    query_b,
    query_g,
    query_t,
    query_i,
    key_b,
    key_s,
    key_i,
    blocks_split,
    blocks_b,
    blocks_g,
    blocks_t,
    softmax_split,
    softmax_b,
    softmax_g,
    scale,
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_TILE: tl.constexpr,
    W: tl.constexpr,
    W_TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    SCORED: tl.constexpr,
):
    program = tl.program_id(0)
    # The last tiles see most keys and start first.
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

    # Distinct, and below what any visible block has, so that a row's worst is always one of its kept.
    kept = tl.full((K_PAD, ROWS), _INT64_MIN, tl.int64) + (tl.arange(0, K_PAD) + 1).to(tl.int64)[:, None]
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    if SCORED:
        # What is finite from the start keeps −∞ − (−∞) out.
        highest = tl.full((ROWS,), _LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    own_score = tl.full((ROWS,), float("-inf"), tl.float32)

    steps = (keys - queries + tl.minimum((tile * ROWS + ROWS - 1) // G, queries - 1)) // W // BLOCKS + 1
    share = (steps + splits - 1) // splits
    first = split * share
    last = tl.minimum(first + share, steps)
    # Up to here the tile's first token sees every key.
    full = first
    if W % W_TILE == 0:
        full = tl.maximum(tl.minimum((keys - queries + tile * ROWS // G + 1) // (W * BLOCKS), last), first)
        for step in range(first, full):
            kept, highest, total, own_score = _step(
                step, query, query_ptrs, live, position, own, kept, highest, total, own_score,
                key_ptr, query_i, key_s, key_i, keys, scale,
                WIDTH, WIDTH_TILE, W, W_TILE, BLOCKS, ROWS, False, SCORED,
            )  # fmt: skip
    for step in range(full, last):
        kept, highest, total, own_score = _step(
            step, query, query_ptrs, live, position, own, kept, highest, total, own_score,
            key_ptr, query_i, key_s, key_i, keys, scale,
            WIDTH, WIDTH_TILE, W, W_TILE, BLOCKS, ROWS, True, SCORED,
        )  # fmt: skip

    place = split * blocks_split + batch * blocks_b + group.to(tl.int64) * blocks_g + column * blocks_t
    for slot in range(K):
        top = tl.max(kept, 0)
        kept = tl.where(kept == top[None, :], _INT64_MIN, kept)
        found = top > tl.full((), _INT64_MIN, tl.int64) + K_PAD
        block = -(top & 0xFFFFFFFF).to(tl.int32) + _INT32_MAX
        tl.store(blocks_ptr + place + slot, tl.where(found, block, -1), mask=live)
        if SCORED:
            ordered = (top >> 32).to(tl.int32)
            score = (ordered ^ ((ordered >> 31) & _INT32_MAX)).to(tl.float32, bitcast=True)
            score = tl.where(block == own, own_score, score)
            tl.store(scores_ptr + place + slot, tl.where(found, score, float("-inf")), mask=live)
    if SCORED:
        place = 2 * (split * softmax_split + batch * softmax_b + group.to(tl.int64) * softmax_g + column)
        tl.store(softmax_ptr + place, highest, mask=live)
        tl.store(softmax_ptr + place + 1, total, mask=live)
