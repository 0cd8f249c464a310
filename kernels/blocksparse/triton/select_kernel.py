"""The kernel of `select.py`: index scores, block max-pool and top-k of a tile of rows, where a row is a (token, group) pair.

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
    step,
    query,
    query_ptrs,
    live,
    position,
    own,
    best_keys,
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
